//! The full-screen view. What is drawn follows from [`State`] and [`Screen`] alone.

use std::{cmp::Ordering, collections::HashMap, time::Duration};

use ratatui::{
    Frame,
    crossterm::event::{KeyCode, KeyEvent, KeyModifiers},
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Block, Cell, Clear, Paragraph, Row as TableRow, Table, TableState},
};
use underpass_abi::watch::{FlowKey, direction, quality};

use super::{
    output::{address, attribution, bytes, comm, duration, protocol},
    place,
    state::{HISTORY, Open, State},
};

/// What a row stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Group {
    #[default]
    Connection,
    Process,
    Remote,
    Container,
}

/// What the rows are ordered by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Sort {
    #[default]
    Rate,
    Received,
    Sent,
    Name,
    Remote,
}

/// What lies over the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Overlay {
    #[default]
    None,
    Help,
    Details,
}

/// What the person at the terminal has chosen.
#[derive(Debug, Default)]
pub struct Screen {
    group: Group,
    sort: Sort,
    reversed: bool,
    filter: String,
    typing: bool,
    overlay: Overlay,
    selected: usize,
    colourless: bool,
    notes: Vec<String>,
}

/// One row of the table: a connection or a group of them.
#[derive(Debug, Default)]
struct Row {
    key: Option<FlowKey>,
    name: String,
    protocol: String,
    arrow: &'static str,
    remote: String,
    count: usize,
    rate: (f64, f64),
    bytes: (u64, u64),
    history: Vec<u64>,
}

/// What a key press asks of the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Draw again and go on.
    Stay,
    /// End.
    Leave,
}

impl Screen {
    /// A view without colours if the environment has `NO_COLOR` (no-color.org).
    /// `notes` are shown in the help.
    pub fn new(notes: Vec<String>) -> Self {
        let colourless = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { colourless, notes, ..Self::default() }
    }

    /// Takes a key press.
    #[expect(clippy::wildcard_enum_match_arm, reason = "all other keys do nothing")]
    pub fn press(&mut self, key: KeyEvent) -> Answer {
        if key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL) {
            return Answer::Leave;
        }
        if self.typing {
            self.type_in(key.code);
            return Answer::Stay;
        }
        if self.overlay != Overlay::None {
            self.overlay = Overlay::None;
            return Answer::Stay;
        }
        match key.code {
            KeyCode::Char('q') => return Answer::Leave,
            KeyCode::Char('?' | 'h') => self.overlay = Overlay::Help,
            KeyCode::Enter => self.overlay = Overlay::Details,
            KeyCode::Char('/') => self.typing = true,
            KeyCode::Char('r') => self.reversed = !self.reversed,
            KeyCode::Esc => self.filter.clear(),
            KeyCode::Char('s') => self.sort = self.sort.next(),
            KeyCode::Char('g') => {
                self.group = self.group.next();
                self.selected = 0;
            }
            KeyCode::Down | KeyCode::Char('j') => self.selected = self.selected.saturating_add(1),
            KeyCode::Up | KeyCode::Char('k') => self.selected = self.selected.saturating_sub(1),
            KeyCode::PageDown => self.selected = self.selected.saturating_add(20),
            KeyCode::PageUp => self.selected = self.selected.saturating_sub(20),
            KeyCode::Home => self.selected = 0,
            KeyCode::End => self.selected = usize::MAX,
            _ => {}
        }
        Answer::Stay
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "all other keys do nothing")]
    fn type_in(&mut self, key: KeyCode) {
        match key {
            KeyCode::Enter => self.typing = false,
            KeyCode::Esc => {
                self.typing = false;
                self.filter.clear();
            }
            KeyCode::Backspace => drop(self.filter.pop()),
            KeyCode::Char(letter) => self.filter.push(letter),
            _ => {}
        }
    }

    /// Draws everything.
    pub fn draw(&mut self, frame: &mut Frame<'_>, state: &State) {
        let rows = self.rows(state);
        self.selected = self.selected.min(rows.len().saturating_sub(1));
        let [head, body, foot] =
            Layout::vertical([Constraint::Length(2), Constraint::Min(1), Constraint::Length(1)])
                .areas(frame.area());
        frame.render_widget(Paragraph::new(self.head(state, rows.len())), head);
        self.table(frame, body, &rows);
        frame.render_widget(Paragraph::new(self.foot()), foot);
        match self.overlay {
            Overlay::None => {}
            Overlay::Help => over(frame, "Help", self.help()),
            Overlay::Details => {
                let open = rows
                    .get(self.selected)
                    .and_then(|row| row.key)
                    .and_then(|key| state.open().find(|(other, _)| **other == key).map(|(_, open)| open));
                over(frame, "Connection", details(open));
            }
        }
    }

    fn head(&self, state: &State, shown: usize) -> Vec<Line<'static>> {
        let (totals, lost) = (state.totals(), state.lost());
        let (mut rx, mut tx, mut open) = (0.0, 0.0, 0);
        for (_, connection) in state.open() {
            rx += connection.rate.0;
            tx += connection.rate.1;
            open += 1;
        }
        let missed = lost.events
            + lost.names
            + lost.changes
            + lost.datagrams
            + lost.sockets
            + lost.passages
            + lost.undecoded;
        let lost = format!("lost {missed}, unattributed {}", lost.unattributed);
        let alarm =
            if missed > 0 { self.colour(Color::Red).add_modifier(Modifier::BOLD) } else { Style::new() };
        vec![
            Line::from(vec![
                Span::styled("underpass watch", Style::new().add_modifier(Modifier::BOLD)),
                Span::raw(format!("  {open} open, {} seen  ", totals.connections)),
                Span::styled(format!("in {}/s  ", bytes(rx as u64)), self.colour(Color::Green)),
                Span::styled(format!("out {}/s", bytes(tx as u64)), self.colour(Color::Cyan)),
            ]),
            Line::from(vec![
                Span::styled(lost, alarm),
                Span::raw(format!("  {shown} rows by {}, {}", self.group.word(), self.sort.word())),
                Span::raw(if self.reversed { " reversed" } else { "" }),
                Span::raw(if self.filter.is_empty() { String::new() } else { format!("  /{}", self.filter) }),
            ]),
        ]
    }

    fn table(&self, frame: &mut Frame<'_>, area: Rect, rows: &[Row]) {
        let single = self.group == Group::Connection;
        let widths = [
            Constraint::Length(if single { 20 } else { 22 }),
            Constraint::Length(if single { 6 } else { 5 }),
            Constraint::Min(16),
            Constraint::Length(10),
            Constraint::Length(10),
            Constraint::Length(if area.width >= 100 { HISTORY as u16 } else { 8 }),
        ];
        let wide = if area.width >= 100 { HISTORY } else { 8 };
        let head = match self.group {
            Group::Connection => ["process", "", "remote"],
            Group::Process => ["process", "conns", "received, sent"],
            Group::Remote => ["remote", "conns", "received, sent"],
            Group::Container => ["container or unit", "conns", "received, sent"],
        };
        let head = [head[0], head[1], head[2], "in/s", "out/s", "trend"];
        let body = rows.iter().map(|row| {
            let (second, third) = if single {
                (row.protocol.clone(), format!("{} {}", row.arrow, row.remote))
            } else {
                (row.count.to_string(), format!("{}, {}", bytes(row.bytes.0), bytes(row.bytes.1)))
            };
            TableRow::new([
                Cell::from(row.name.clone()),
                Cell::from(second),
                Cell::from(third),
                Cell::from(rate(row.rate.0)).style(self.colour(Color::Green)),
                Cell::from(rate(row.rate.1)).style(self.colour(Color::Cyan)),
                Cell::from(spark(&row.history, wide)),
            ])
        });
        let table = Table::new(body, widths)
            .header(TableRow::new(head).style(Style::new().add_modifier(Modifier::UNDERLINED)))
            .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
        let mut position = TableState::new().with_selected((!rows.is_empty()).then_some(self.selected));
        frame.render_stateful_widget(table, area, &mut position);
    }

    fn foot(&self) -> Line<'static> {
        if self.typing {
            return Line::from(format!("filter: {}_   Enter keeps it, Esc drops it", self.filter));
        }
        Line::from("? help  s sort  r reverse  g group  / filter  Enter details  q quit")
            .style(Style::new().add_modifier(Modifier::DIM))
    }

    fn help(&self) -> Vec<Line<'static>> {
        let keys = [
            ("up, down, k, j", "choose a row (Page Up, Page Down, Home, End)"),
            ("Enter", "details of the chosen connection"),
            ("s", "sort by rate, received, sent, name, remote"),
            ("r", "reverse the order"),
            ("g", "group by connection, process, remote, container"),
            ("/", "show only what contains a text; Esc drops it"),
            ("q, Ctrl-C", "leave"),
        ];
        let mut lines: Vec<_> =
            keys.iter().map(|(key, what)| Line::from(format!("{key:<15} {what}"))).collect();
        lines.push(Line::default());
        lines.push(Line::from("-> opened here, <- opened there, -- open before the start."));
        lines.push(Line::from("<> passes through this host."));
        lines.push(Line::from("A process in (brackets) listens; nobody has used the"));
        lines.push(Line::from("connection yet. [brackets] are threads of the kernel."));
        lines.extend(self.notes.iter().map(|note| Line::from(note.clone())));
        lines
    }

    fn rows(&self, state: &State) -> Vec<Row> {
        let needle = self.filter.to_lowercase();
        let single = state.open().map(|(key, open)| row(key, open));
        let single = single.filter(|(row, container)| {
            needle.is_empty()
                || [&row.name, &row.remote, &row.protocol, container]
                    .iter()
                    .any(|text| text.to_lowercase().contains(&needle))
        });
        let mut rows: Vec<Row> = match self.group {
            Group::Connection => single.map(|(row, _)| row).collect(),
            group @ (Group::Process | Group::Remote | Group::Container) => grouped(group, single),
        };
        rows.sort_by(|a, b| {
            // Rows that are alike stand by their sockets, or they would change places at each look.
            let socket = |row: &Row| row.key.map(|key| key.cookie);
            self.sort
                .compare(a, b)
                .then_with(|| a.name.cmp(&b.name))
                .then_with(|| a.remote.cmp(&b.remote))
                .then_with(|| socket(a).cmp(&socket(b)))
        });
        if self.reversed {
            rows.reverse();
        }
        rows
    }

    fn colour(&self, colour: Color) -> Style {
        if self.colourless { Style::new() } else { Style::new().fg(colour) }
    }
}

impl Group {
    fn next(self) -> Self {
        match self {
            Self::Connection => Self::Process,
            Self::Process => Self::Remote,
            Self::Remote => Self::Container,
            Self::Container => Self::Connection,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Connection => "connection",
            Self::Process => "process",
            Self::Remote => "remote",
            Self::Container => "container",
        }
    }
}

impl Sort {
    fn next(self) -> Self {
        match self {
            Self::Rate => Self::Received,
            Self::Received => Self::Sent,
            Self::Sent => Self::Name,
            Self::Name => Self::Remote,
            Self::Remote => Self::Rate,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Rate => "fastest first",
            Self::Received => "most received first",
            Self::Sent => "most sent first",
            Self::Name => "by name",
            Self::Remote => "by remote",
        }
    }

    fn compare(self, a: &Row, b: &Row) -> Ordering {
        match self {
            Self::Rate => (b.rate.0 + b.rate.1).total_cmp(&(a.rate.0 + a.rate.1)),
            Self::Received => b.bytes.0.cmp(&a.bytes.0),
            Self::Sent => b.bytes.1.cmp(&a.bytes.1),
            Self::Name => a.name.cmp(&b.name),
            Self::Remote => a.remote.cmp(&b.remote),
        }
    }
}

/// A connection's row, and where its process runs.
fn row(key: &FlowKey, open: &Open) -> (Row, String) {
    let report = &open.view.report;
    let place = open.view.program.as_ref().map(|program| place::of(&program.cgroup_path)).unwrap_or_default();
    let name = match report.owner.quality {
        quality::NONE => "-".to_owned(),
        quality::LISTENER => format!("({}) {}", comm(report), report.owner.tgid),
        _ => format!("{} {}", comm(report), report.owner.tgid),
    };
    let row = Row {
        key: Some(*key),
        name,
        protocol: protocol(report.protocol).into_owned(),
        arrow: match report.direction {
            direction::OUTBOUND => "->",
            direction::INBOUND => "<-",
            direction::FORWARDED => "<>",
            _ => "--",
        },
        remote: remote(open),
        count: 1,
        rate: open.rate,
        bytes: (report.rx_bytes, report.tx_bytes),
        history: open.history.iter().map(|count| u64::from(*count)).collect(),
    };
    (row, place.container.or(place.unit).unwrap_or_else(|| "-".to_owned()))
}

/// The remote's name and port where the name is known.
fn remote(open: &Open) -> String {
    let report = &open.view.report;
    match &open.view.remote_name {
        Some(name) => format!("{name}:{}", report.remote_port),
        None => address(&report.remote, report.remote_port, &report.local).unwrap_or_else(|| "-".to_owned()),
    }
}

fn grouped(group: Group, rows: impl Iterator<Item = (Row, String)>) -> Vec<Row> {
    let mut groups: HashMap<String, Row> = HashMap::new();
    for (row, container) in rows {
        let name = match group {
            Group::Connection | Group::Process => row.name,
            Group::Remote => {
                row.remote.rsplit_once(':').map_or(row.remote.clone(), |(host, _)| host.to_owned())
            }
            Group::Container => container,
        };
        let sum = groups.entry(name.clone()).or_insert_with(|| Row { name, ..Row::default() });
        sum.count += 1;
        sum.rate = (sum.rate.0 + row.rate.0, sum.rate.1 + row.rate.1);
        sum.bytes = (sum.bytes.0 + row.bytes.0, sum.bytes.1 + row.bytes.1);
        // Histories end now: they are added from their ends.
        let len = sum.history.len().max(row.history.len());
        let padded = |history: &[u64]| [vec![0; len - history.len()], history.to_vec()].concat();
        sum.history = padded(&sum.history).iter().zip(padded(&row.history)).map(|(a, b)| a + b).collect();
    }
    groups.into_values().collect()
}

fn details(open: Option<&Open>) -> Vec<Line<'static>> {
    let Some(open) = open else {
        return vec![Line::from("Choose a connection (g shows them one by one).")];
    };
    let (view, report) = (&open.view, &open.view.report);
    let place = view.program.as_ref().map(|program| place::of(&program.cgroup_path)).unwrap_or_default();
    let program = |field: fn(&super::event::Program) -> &String| {
        view.program.as_deref().map(field).filter(|text| !text.is_empty()).cloned()
    };
    let fields = [
        (
            "process",
            Some(format!("{} {}", comm(report), report.owner.tgid)).filter(|_| report.owner.quality > 0),
        ),
        ("known by", Some(attribution(report).to_owned())),
        ("program", program(|program| &program.exe)),
        ("user", Some(report.owner.uid.to_string()).filter(|_| report.owner.quality > 0)),
        ("cgroup", program(|program| &program.cgroup_path)),
        ("container", place.container),
        ("unit", place.unit),
        ("protocol", Some(protocol(report.protocol).into_owned())),
        ("local", address(&report.local, report.local_port, &report.remote)),
        ("remote", address(&report.remote, report.remote_port, &report.local)),
        ("name", view.remote_name.as_ref().map(ToString::to_string)),
        ("namespace", Some(report.netns.to_string())),
        ("received", Some(format!("{} ({} bytes)", bytes(report.rx_bytes), report.rx_bytes))),
        ("sent", Some(format!("{} ({} bytes)", bytes(report.tx_bytes), report.tx_bytes))),
        ("round trip", (report.rtt_us > 0).then(|| format!("{:.3} ms", f64::from(report.rtt_us) / 1000.0))),
        ("sent again", (report.protocol == 6).then(|| format!("{} segments", report.retransmits))),
        ("lasts", duration(report).map(|duration| format!("{} s", Duration::as_secs(&duration)))),
    ];
    let known =
        fields.into_iter().filter_map(|(name, value)| Some(Line::from(format!("{name:<11} {}", value?))));
    known.collect()
}

/// A box in the middle, as large as its text.
fn over(frame: &mut Frame<'_>, title: &'static str, lines: Vec<Line<'static>>) {
    let all = frame.area();
    let width = lines.iter().map(Line::width).max().unwrap_or(0) as u16 + 4;
    let (width, height) = (width.min(all.width), (lines.len() as u16 + 2).min(all.height));
    let area = Rect { x: (all.width - width) / 2, y: (all.height - height) / 2, width, height };
    frame.render_widget(Clear, area);
    let block = Block::bordered().title(title).padding(ratatui::widgets::Padding::horizontal(1));
    frame.render_widget(Paragraph::new(lines).block(block), area);
}

fn rate(rate: f64) -> String {
    if rate < 0.5 { "-".to_owned() } else { bytes(rate as u64) }
}

/// The last values as bars, scaled to their largest.
fn spark(history: &[u64], width: usize) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let last = &history[history.len().saturating_sub(width)..];
    let most = last.iter().copied().max().unwrap_or(0);
    last.iter().map(|value| if *value == 0 { ' ' } else { BARS[(value * 7 / most) as usize] }).collect()
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend, crossterm::event::KeyEvent};
    use underpass_abi::watch::{Connection, event, flag};

    use super::*;
    use crate::watch::{
        event::{Event, Program},
        state::tests::{SECOND, report},
    };

    fn state() -> State {
        let mut state = State::default();
        state.tick(1);
        let container = format!("/docker/{}", "0123456789abcdef".repeat(4));
        let programs = [
            (100, "/usr/bin/curl", String::new()),
            (200, "/usr/sbin/nginx", container),
            (300, "", String::new()),
        ];
        for (pid, exe, cgroup_path) in programs {
            let program = Program { pid, exe: exe.to_owned(), cgroup: 1, cgroup_path };
            state.apply(Event::Process(program), 1);
        }
        let curl = report(1, 100, b"curl", 500_000, 1000);
        let nginx =
            Connection { direction: direction::INBOUND, ..report(2, 200, b"nginx", 90_000, 2_500_000) };
        let other = Connection { direction: direction::INBOUND, ..report(3, 200, b"nginx", 10, 20) };
        let kernel = Connection { flags: flag::KERNEL, ..report(4, 300, b"kworker/0:1", 0, 0) };
        let udp = Connection { protocol: 17, rtt_us: 0, ..report(5, 100, b"curl", 120, 60) };
        for report in [curl, nginx, other, kernel, udp] {
            state.apply(Event::Alive(Connection { kind: event::LIVE, ..report }), 1);
        }
        state.tick(1 + SECOND);
        state
    }

    fn drawn(screen: &mut Screen, state: &State, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| screen.draw(frame, state)).unwrap();
        terminal.backend().to_string()
    }

    fn press(screen: &mut Screen, keys: &str) {
        for key in keys.chars() {
            let code = if key == '\n' { KeyCode::Enter } else { KeyCode::Char(key) };
            assert_eq!(screen.press(KeyEvent::from(code)), Answer::Stay);
        }
    }

    #[test]
    fn the_views_look_as_they_did() {
        let state = state();
        for (name, keys, width) in [
            ("connections", "", 80),
            ("wide", "", 120),
            ("by_process", "g", 80),
            ("by_container", "ggg", 80),
            ("sorted_by_name", "sssr", 80),
            ("filtered", "/nginx\n", 80),
            ("help", "?", 80),
            ("details", "j\n", 80),
        ] {
            let mut screen = Screen::default();
            press(&mut screen, keys);
            insta::assert_snapshot!(name, drawn(&mut screen, &state, width, 24));
        }
    }

    #[test]
    fn small_terminals_and_empty_tables_do_no_harm() {
        for (width, height) in [(1, 1), (10, 3), (20, 5), (79, 23)] {
            for keys in ["", "?", "\n", "g"] {
                let mut screen = Screen::default();
                press(&mut screen, keys);
                drawn(&mut screen, &state(), width, height);
                drawn(&mut screen, &State::default(), width, height);
            }
        }
    }

    #[test]
    fn q_leaves_and_esc_drops_the_filter() {
        let mut screen = Screen::default();
        press(&mut screen, "/q\n");
        assert_eq!(screen.filter, "q");
        screen.press(KeyEvent::from(KeyCode::Esc));
        assert!(screen.filter.is_empty());
        assert_eq!(screen.press(KeyEvent::from(KeyCode::Char('q'))), Answer::Leave);
    }
}
