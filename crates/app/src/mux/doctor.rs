//! What `underpass doctor` tells of the multiplexer.

use aya::{
    EbpfLoader,
    programs::{Program, ProgramError},
};

use crate::{
    doctor::{Check, Function},
    object,
};

/// Loads each program and attaches none.
pub(crate) fn doctor() -> Function {
    let mut checks = vec![check("TCP, mux listen", Ok("needs nothing".to_owned()))];
    match EbpfLoader::new().load(object::MUX) {
        Ok(mut object) => {
            for (program, name) in
                [("mux_in", "UDP, --hook tc"), ("mux_xdp", "UDP, --hook xdp"), ("mux_out", "UDP, replies")]
            {
                let result = match object.program_mut(program) {
                    Some(Program::Xdp(program)) => program.load(),
                    Some(Program::SchedClassifier(program)) => program.load(),
                    Some(_) | None => Err(ProgramError::InvalidName { name: program.to_owned() }),
                };
                let result = result.map(|()| "the kernel takes the program".to_owned());
                checks.push(check(name, result.map_err(|error| reason(&error))));
            }
        }
        Err(error) => checks.push(check("UDP, mux attach", Err(reason(&error)))),
    }
    let missing = checks.iter().filter(|check| !check.ok);
    let missing = missing.map(|check| format!("{}: {}", check.name, check.detail)).collect();
    // TCP works for everybody.
    Function { name: "mux", works: true, missing, checks }
}

fn check(name: &str, result: Result<String, String>) -> Check {
    let (ok, detail) = match result {
        Ok(detail) => (true, detail),
        Err(detail) => {
            (false, format!("{detail}; run as root or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"))
        }
    };
    Check { name: name.to_owned(), ok, detail }
}

/// What the kernel said.
fn reason(error: &dyn std::error::Error) -> String {
    let mut inner = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string().lines().next().unwrap_or_default().to_owned()
}
