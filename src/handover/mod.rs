//! Everything that passes between two generations: the manifest, and the frames that go with it.

pub(crate) mod escape;
pub(crate) mod frames;
pub(crate) mod manifest;
pub(crate) mod pipe;
