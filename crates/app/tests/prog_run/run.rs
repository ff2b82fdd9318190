//! Loading an object and running its programs on a packet.

use aya::{
    Ebpf,
    programs::{Program, ProgramError, SchedClassifier, TestRun as _, TestRunOptions, Xdp},
};

/// What a program made of a packet.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The program's return value.
    pub verdict: u32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
}

/// Loads every XDP and TC program of an object.
///
/// # Panics
/// If the verifier refuses one; its log is in the message.
pub fn load(object: &[u8]) -> Ebpf {
    let mut object = aya::EbpfLoader::new().load(object).unwrap();
    load_programs(&mut object);
    object
}

/// Loads every XDP and TC program of an object that is open already.
pub fn load_programs(object: &mut Ebpf) {
    for (name, program) in object.programs_mut() {
        let result = match program {
            Program::Xdp(program) => program.load(),
            Program::SchedClassifier(program) => program.load(),
            _ => continue,
        };
        if let Err(error) = result {
            panic!("{name}: {}", explain(&error));
        }
    }
}

/// Runs a loaded program once.
pub fn run(object: &mut Ebpf, program: &str, packet: &[u8]) -> Outcome {
    let mut out = vec![0; packet.len() + 256];
    let mut options = TestRunOptions::new();
    options.data_in = Some(packet);
    options.data_out = Some(&mut out);
    let program = object.program_mut(program).unwrap_or_else(|| panic!("no program {program}"));
    let result = match program {
        Program::Xdp(program) => Xdp::test_run(program, options),
        Program::SchedClassifier(program) => SchedClassifier::test_run(program, options),
        other => panic!("{other:?} is neither XDP nor TC"),
    }
    .unwrap();
    out.truncate(result.data_size_out as usize);
    Outcome { verdict: result.return_value, packet: out }
}

fn explain(error: &ProgramError) -> String {
    match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            let tail: Vec<_> = log.lines().rev().take(60).collect();
            let tail: Vec<_> = tail.into_iter().rev().collect();
            format!("{io_error}\n{}", tail.join("\n"))
        }
        error => error.to_string(),
    }
}
