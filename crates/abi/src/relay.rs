//! The relay's kernel path.
