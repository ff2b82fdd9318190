//! Plots of a [`Table`] as SVG: bars for subjects side by side, lines for growth.

use std::fmt::Write as _;

use crate::report::{Better, Measure, Table, number};

const PANEL: f64 = 440.0;
/// Room for the subjects' names.
const NAMES: f64 = 150.0;
const BAR: f64 = 16.0;
const HEAD: f64 = 34.0;

/// A panel a measure with a bar a subject: underpass in blue, peers in sand, the row
/// that the ratios refer to in grey.
pub fn bars(table: &Table) -> String {
    let rows: Vec<&str> = table.rows().collect();
    let height = HEAD + rows.len() as f64 * (BAR + 4.0) + 14.0;
    let panels = panels(table, height, |out, measure, x, y| {
        let medians: Vec<_> = rows.iter().map(|row| table.median(row, &measure.name)).collect();
        let longest = medians.iter().flatten().copied().fold(f64::MIN_POSITIVE, f64::max);
        for (i, (row, median)) in rows.iter().zip(&medians).enumerate() {
            let top = y + HEAD + i as f64 * (BAR + 4.0);
            text(out, x + NAMES - 6.0, top + 12.0, "end", row);
            let Some(value) = median else {
                text(out, x + NAMES, top + 12.0, "start", "-");
                continue;
            };
            let width = value / longest * (PANEL - NAMES - 70.0);
            let colour = if Some(*row) == table.base.as_deref() { "#9a9a9a" } else { colour_of(row) };
            let _ = writeln!(
                out,
                r#"<rect x="{:.1}" y="{top:.1}" width="{:.1}" height="{BAR}" fill="{colour}"/>"#,
                x + NAMES,
                width.max(1.0)
            );
            text(out, x + NAMES + width + 4.0, top + 12.0, "start", &number(*value));
        }
    });
    document(&panels.0, panels.1)
}

/// A panel a measure with a line a subject. Rows are named `subject @ x`; the points
/// stand side by side in the order of the rows, the vertical axis is logarithmic.
pub fn lines(table: &Table, x_axis: &str) -> String {
    let points: Vec<(&str, &str, &str)> =
        table.rows().filter_map(|row| row.split_once(" @ ").map(|(subject, x)| (row, subject, x))).collect();
    let subjects = distinct(points.iter().map(|point| point.1));
    let xs = distinct(points.iter().map(|point| point.2));
    let (plot_width, plot_height) = (PANEL - NAMES - 70.0, 200.0);
    let panels = panels(table, HEAD + plot_height + 40.0, |out, measure, x, y| {
        let values: Vec<_> = points.iter().filter_map(|p| table.median(p.0, &measure.name)).collect();
        let positive = values.iter().copied().filter(|v| *v > 0.0);
        let low = positive.clone().fold(f64::INFINITY, f64::min).log10().floor();
        let high = positive.fold(f64::MIN_POSITIVE, f64::max).log10().ceil().max(low + 1.0);
        let at_x = |i: usize| x + 60.0 + i as f64 / (xs.len().max(2) - 1) as f64 * plot_width;
        let at_y = |v: f64| y + HEAD + (high - v.log10()) / (high - low) * plot_height;
        for power in low as i32..=high as i32 {
            let line = at_y(10f64.powi(power));
            let _ =
                writeln!(out, r##"<path d="M{:.1} {line:.1}h{plot_width:.1}" stroke="#ddd"/>"##, x + 60.0);
            text(out, x + 54.0, line + 4.0, "end", &number(10f64.powi(power)));
        }
        for (i, label) in xs.iter().enumerate() {
            text(out, at_x(i), y + HEAD + plot_height + 16.0, "middle", label);
        }
        text(out, x + 60.0 + plot_width / 2.0, y + HEAD + plot_height + 32.0, "middle", x_axis);
        let mut ends = vec![];
        for (n, subject) in subjects.iter().enumerate() {
            let line: Vec<_> = xs
                .iter()
                .enumerate()
                .filter_map(|(i, x)| Some((i, table.median(&format!("{subject} @ {x}"), &measure.name)?)))
                .filter(|(_, value)| *value > 0.0)
                .map(|(i, value)| (at_x(i), at_y(value)))
                .collect();
            let Some(end) = line.last() else { continue };
            let path: Vec<_> = line.iter().map(|(x, y)| format!("{x:.1} {y:.1}")).collect();
            let colour = LINES[n % LINES.len()];
            let _ = writeln!(
                out,
                r#"<path d="M{}" fill="none" stroke="{colour}" stroke-width="2"/>"#,
                path.join("L")
            );
            for (x, y) in &line {
                let _ = writeln!(out, r#"<circle cx="{x:.1}" cy="{y:.1}" r="3" fill="{colour}"/>"#);
            }
            ends.push((end.0, end.1, *subject, colour));
        }
        // Names at the lines' ends, pushed apart where lines end together.
        ends.sort_by(|a, b| a.1.total_cmp(&b.1));
        let mut above = f64::NEG_INFINITY;
        for (x, y, subject, colour) in ends {
            let at = y.max(above + 13.0);
            above = at;
            let _ = writeln!(
                out,
                r#"<text x="{:.1}" y="{:.1}" style="fill:{colour}">{}</text>"#,
                x + 8.0,
                at + 4.0,
                escape(subject)
            );
        }
    });
    document(&panels.0, panels.1)
}

const LINES: [&str; 8] =
    ["#1f6fb2", "#d9822b", "#3a9a5b", "#8a56ac", "#c0392b", "#6b6b6b", "#b5912a", "#2aa198"];

fn colour_of(row: &str) -> &'static str {
    if row.starts_with("underpass") { "#1f6fb2" } else { "#d9b38c" }
}

/// Lays the measures out two in a row; returns the drawing and its height.
fn panels(
    table: &Table,
    height: f64,
    mut panel: impl FnMut(&mut String, &Measure, f64, f64),
) -> (String, f64) {
    let mut out = String::new();
    for (i, measure) in table.measures.iter().enumerate() {
        let (x, y) = ((i % 2) as f64 * PANEL, (i / 2) as f64 * height);
        let arrow = if measure.better == Better::Higher { "more is better" } else { "less is better" };
        let _ = writeln!(
            out,
            r#"<text x="{:.1}" y="{:.1}" class="head">{} <tspan class="way">({arrow})</tspan></text>"#,
            x + 10.0,
            y + 22.0,
            escape(&measure.name)
        );
        panel(&mut out, measure, x, y);
    }
    (out, table.measures.len().div_ceil(2) as f64 * height)
}

fn document(body: &str, height: f64) -> String {
    let width = PANEL * 2.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height:.0}\" width=\"{width}\" \
         height=\"{height:.0}\">\n<style>text{{font:12px sans-serif;fill:#222}}.head{{font-weight:bold}}\
         .way{{font-weight:normal;fill:#666}}</style>\n<rect width=\"100%\" height=\"100%\" \
         fill=\"#fff\"/>\n{body}</svg>\n"
    )
}

fn text(out: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let _ = writeln!(out, r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#, escape(text));
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn distinct<'a>(values: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = vec![];
    for value in values {
        if !seen.contains(&value) {
            seen.push(value);
        }
    }
    seen
}
