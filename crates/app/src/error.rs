//! How a command fails, and the exit status that tells scripts which kind it was.

use std::process::ExitCode;

/// The result of a command.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a command ended early. Each kind has its exit status.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Exit status 1: it failed while running.
    #[error("{0:#}")]
    Failed(#[from] anyhow::Error),
    /// Exit status 2: the command line or the config is wrong. The message names
    /// what was wrong, where, and what was expected.
    #[error("{0}")]
    Usage(String),
    /// Exit status 3: this kernel or these privileges cannot do it. The message
    /// names what is missing and what to do.
    #[error("{0}")]
    Unable(String),
}

impl Error {
    /// The exit status of this kind of failure.
    pub fn status(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Failed(_) => 1,
            Self::Usage(_) => 2,
            Self::Unable(_) => 3,
        })
    }
}
