//! Everything that passes between two generations: the manifest, the descriptors, and the messages.

pub(crate) mod ancestors;
pub(crate) mod blob;
pub(crate) mod drain_status;
pub(crate) mod entry;
pub(crate) mod escape;
pub(crate) mod from_1_1_1;
pub(crate) mod greeting;
pub(crate) mod held_open;
pub(crate) mod lines;
pub(crate) mod link;
pub(crate) mod manifest;
pub(crate) mod receive;
pub(crate) mod scm;
pub(crate) mod variable;
