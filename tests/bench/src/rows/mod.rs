//! The rows of the results, one file per kind.

pub mod accept;
pub mod build;
pub mod hold;
pub mod latency;
pub mod memory;
pub mod stall;
pub mod syscalls;
pub mod tasks;
pub mod upgrade;
