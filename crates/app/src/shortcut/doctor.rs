//! What `underpass doctor` tells of the shortcut.

use super::probe::{self, Finding, Harm};
use crate::{
    capabilities::{self, Capability},
    doctor::{Check, Function},
};

/// What attaching takes.
pub(super) const NEEDED: [Capability; 3] = [Capability::Bpf, Capability::NetAdmin, Capability::Perfmon];

/// Tries how accelerated sockets behave here.
pub(crate) fn doctor() -> Function {
    match findings() {
        Ok(findings) => report(&findings),
        Err(error) => {
            let detail = format!("{error:#}");
            let check = Check { name: "probe".into(), ok: false, detail: detail.clone() };
            Function { name: "shortcut", works: false, missing: vec![detail], checks: vec![check] }
        }
    }
}

fn findings() -> anyhow::Result<Vec<Finding>> {
    capabilities::require(&NEEDED)?;
    // The probe makes a network namespace of its own.
    capabilities::require(&[Capability::SysAdmin])?;
    probe::run()
}

fn report(findings: &[Finding]) -> Function {
    let holds: Vec<_> = findings
        .iter()
        .filter(|finding| finding.wrong.is_none())
        .map(|finding| finding.behaviour.name)
        .collect();
    let mut checks =
        vec![Check { name: "as with TCP".into(), ok: !holds.is_empty(), detail: holds.join(", ") }];
    let mut missing = vec![];
    for Finding { behaviour, wrong } in findings {
        let Some(wrong) = wrong else { continue };
        let detail = match behaviour.harm {
            Harm::Data => {
                missing.push(format!(
                    "{}: {wrong}; this kernel would lose data (--accept-risk {0} overrides it)",
                    behaviour.name
                ));
                wrong.clone()
            }
            Harm::Some(harm) => format!("{wrong}. So: {harm}"),
        };
        checks.push(Check { name: behaviour.name.into(), ok: false, detail });
    }
    Function { name: "shortcut", works: missing.is_empty(), missing, checks }
}
