//! The packet library beside a host's parser, on generated and mutated packets.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod frames;
mod parse;
mod rewrite;
