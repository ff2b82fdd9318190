//! What `underpass doctor` tells of the relay.

use super::{engine, pipe::Pipes};
use crate::doctor::{Check, Function};

/// Tries each data path.
pub(crate) fn doctor() -> Function {
    let copy = check("path copy", Ok("needs nothing".into()));
    let pipe = Pipes::default().take();
    let splice = check("path splice", pipe.map(|_| "pipes can be made".into()).map_err(|e| e.to_string()));
    let kernel = check("path kernel", engine::prove().map_err(|e| format!("{e:#}")));
    let missing = if kernel.ok { vec![] } else { vec![format!("path kernel: {}", kernel.detail)] };
    // The kernel path makes it faster; copy alone does the job.
    Function { name: "relay", works: true, missing, checks: vec![copy, splice, kernel] }
}

fn check(name: &str, result: Result<String, String>) -> Check {
    let (ok, detail) = match result {
        Ok(detail) => (true, detail),
        Err(detail) => (false, detail),
    };
    Check { name: name.into(), ok, detail }
}
