//! Everything that passes between two generations: the manifest, and the frames that go with it.

pub(crate) mod blob;
pub(crate) mod escape;
pub(crate) mod frames;
pub(crate) mod link;
pub(crate) mod manifest;
pub(crate) mod pipe;
pub(crate) mod scm;
