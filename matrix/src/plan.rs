//! What the host asks a guest to do, and what the guest reports: one line of JSON
//! each, after a marker, on the serial line that everything else is printed on.

use serde::{Deserialize, Serialize};

/// The file in the guest's image.
pub const PLAN: &str = "/plan.json";
/// Begins a line that is a [`Report`].
pub const MARKER: &str = "@@underpass ";

/// What a guest does.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Files in the image, loaded in this order.
    pub modules: Vec<String>,
    /// Run one after the other.
    pub steps: Vec<Command>,
}

/// A command to run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Command {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// When it is killed.
    pub seconds: u32,
}

/// What a guest has to say.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// The guest is up.
    Started {
        /// As `uname -r` prints it.
        release: String,
    },
    /// A step begins. What follows is its output, until it has ended.
    Begun {
        /// Its place in the plan.
        step: usize,
    },
    /// A step loaded a program.
    Loaded(Load),
    /// A step has ended.
    Ended {
        /// Its place in the plan.
        step: usize,
        /// The exit status; 128 and more for a signal, as in a shell.
        status: i32,
        /// How long it took.
        milliseconds: u64,
    },
    /// The guest could not do what was asked.
    Failed {
        /// Why.
        error: String,
    },
    /// All steps have ended.
    Done,
}

/// A program that was given to the verifier.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Load {
    /// Its name, of which the kernel keeps 15 characters.
    pub program: String,
    /// 0, or the error's number.
    pub error: i32,
    /// What the verifier spent, if it said.
    pub spent: Option<Spent>,
}

/// What the verifier spent on a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spent {
    /// Instructions processed; the verifier gives up at 1,000,000.
    pub instructions: u64,
    /// States kept in all.
    pub states: u64,
}
