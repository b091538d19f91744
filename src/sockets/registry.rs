//! The registry: every descriptor for the next generation, and every descriptor from the parent until it is claimed.
//! Each socket is held twice, once here for the handover and once by the program.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::ioctl_fionbio;

use super::kind::{check_kind, check_name};
use super::producer::Producer;
use crate::error::Error;
use crate::handover::entry::Entry;
use crate::key::{Key, Kind};
use crate::listen::{self, FileId, Start};
use crate::logging;
use crate::manager::Store;

/// All descriptors of a generation that take part in a handover.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    /// The entries for the next generation, in the order in which they were asked for.
    pub(super) ours: Vec<Entry>,
    /// The callbacks that produce state for the next generation, when an upgrade begins or at its commit.
    pub(super) producers: Vec<Producer>,
    /// The socket over which the parent sends the handover at the commit.
    pub(super) late: Option<Arc<OwnedFd>>,
    /// Whether something that the parent sends over it is missing.
    pub(super) late_is_incomplete: bool,
    /// The entries from the parent or the service manager, until they are claimed. They are in the order of the
    /// handover, which is usually also the order of the claims, so that each claim finds its entry at the front.
    pub(super) inherited: VecDeque<Entry>,
    /// Inherited entries that were closed, which the service manager must remove from its store.
    pub(crate) closed: Vec<(Key, Option<FileId>)>,
    /// The state that an earlier stop has passed at its commit. The program takes it after `ready`.
    pub(super) kept_late: Vec<Entry>,
    /// The names of everything that earlier stops have stored.
    kept_names: Vec<String>,
    /// The service manager's store, which keeps copies of the entries.
    pub(super) store: Option<Arc<dyn Store>>,
    /// The first claim that failed for lack of descriptors.
    pub(super) failed: Option<(Key, io::Error)>,
    /// New listeners, with their backlogs, until they start to listen. `None` once new listeners listen immediately.
    ///
    /// From listen(2) on, the kernel completes handshakes and spreads connections over all listening SO_REUSEPORT
    /// sockets. If a child listened before the commit, clients would wait, and would be reset if the child then failed.
    pub(super) pending: Option<Vec<(Key, Arc<OwnedFd>, i32)>>,
    /// Whether a path leads to the same file here and in the parent.
    pub(super) same_paths: bool,
    /// Whether the program has claimed a socket that has an address.
    pub(crate) claimed: bool,
    /// Whether the program intentionally drops every listener of its parent.
    pub(super) discards: bool,
    /// Inherited, and retired before `ready`.
    pub(super) retired: Vec<Entry>,
}

impl Registry {
    pub(super) fn new(inherited: Vec<Entry>, is_child: bool, same_paths: bool) -> Self {
        let mut registry = Self { pending: is_child.then(Vec::new), same_paths, ..Self::default() };
        registry.inherit(inherited);
        registry
    }

    pub(crate) fn inherit(&mut self, entries: Vec<Entry>) {
        let mut inodes = HashSet::with_capacity(self.inherited.len() + entries.len());
        inodes.extend(self.inherited.iter().map(|entry| entry.inode));
        self.inherited.reserve(entries.len());
        self.ours.reserve(entries.len());
        for entry in entries {
            if entry.key.kind() == Kind::Late {
                self.late = Some(entry.fd);
                continue;
            }
            // Two sources may have the same socket.
            let is_new = |known: &Entry| known.inode != entry.inode || known.key != entry.key;
            if inodes.insert(entry.inode) || self.inherited.iter().all(is_new) {
                self.inherited.push_back(entry);
            }
        }
    }

    // ---- hold -------------------------------------------------------------------------------------------------------

    /// Returns when a listener that is created now starts to listen.
    pub(super) fn start(&self) -> Start {
        self.pending.as_ref().map_or_else(Start::default, |_| Start::at_commit())
    }

    /// Starts to listen on all new listeners. Later ones listen immediately.
    pub(super) fn start_listening(&mut self) -> Result<(), Error> {
        for (key, fd, backlog) in self.pending.take().into_iter().flatten() {
            rustix::net::listen(&fd, backlog).map_err(|e| Error::Socket { key, source: e.into() })?;
        }
        Ok(())
    }

    /// Makes nonblocking every socket that peers reach by an address.
    pub(crate) fn make_nonblocking(&self) -> io::Result<()> {
        let mut sockets = self.ours.iter().filter(|entry| entry.key.kind().has_address());
        sockets.try_for_each(|entry| Ok(ioctl_fionbio(&entry.fd, true)?))
    }

    /// Holds a duplicate of a socket after a check of its kind, and makes it nonblocking. A socket with a backlog does
    /// not listen yet.
    pub(super) fn hold(
        &mut self,
        key: &Key,
        fd: BorrowedFd<'_>,
        file: Option<FileId>,
        backlog: Option<i32>,
    ) -> io::Result<()> {
        check_kind(key.kind(), fd, backlog.is_some())?;
        if key.kind().has_address() {
            // Do this before another generation has it, because all processes that hold the socket share the mode.
            ioctl_fionbio(fd, true)?;
        }
        let entry = Entry { file, ..Entry::duplicate(key.clone(), fd)? };
        match (backlog, &mut self.pending) {
            (Some(backlog), Some(pending)) => pending.push((key.clone(), entry.fd.clone(), backlog)),
            // The commit happened while the socket was created.
            (Some(backlog), None) => rustix::net::listen(&entry.fd, backlog)?,
            (None, _) => {}
        }
        if let Some(store) = &self.store {
            store.keep(key, entry.fd.as_fd(), file);
        }
        self.ours.push(entry);
        Ok(())
    }

    /// Holds a duplicate of `fd`, replacing any with the same key.
    pub(super) fn replace(&mut self, key: &Key, fd: BorrowedFd<'_>) -> io::Result<()> {
        check_name(key)?;
        let entry = Entry::duplicate(key.clone(), fd)?;
        self.ours.retain(|held| held.key != *key);
        self.ours.push(entry);
        Ok(())
    }

    /// Makes `producer` produce a descriptor at every upgrade, replacing the one for the same key and moment.
    pub(super) fn produce(&mut self, producer: Producer) -> io::Result<()> {
        check_name(&producer.key)?;
        self.producers.retain(|held| held.key != producer.key || held.at_commit != producer.at_commit);
        self.producers.push(producer);
        Ok(())
    }

    /// Drops everything with this key, and returns how many entries for the next generation there were.
    pub(super) fn retire(&mut self, key: &Key) -> usize {
        let Self { ours, producers, inherited, retired, store, .. } = self;
        let before = ours.len() + producers.len();
        ours.retain(|entry| {
            if let (true, Some(store)) = (entry.key == *key, &store) {
                store.forget(key, entry.file);
            }
            entry.key != *key
        });
        producers.retain(|held| held.key != *key);
        let (gone, kept): (VecDeque<_>, _) = mem::take(inherited).into_iter().partition(|entry| entry.key == *key);
        *inherited = kept;
        retired.extend(gone);
        before - ours.len() - producers.len()
    }

    /// Keeps the files of the Unix sockets with this key at a final stop, because the program still listens on them.
    #[cfg(feature = "tokio_ecdysis")]
    pub(crate) fn keep_files(&mut self, key: &Key) {
        for entry in self.ours.iter_mut().filter(|entry| entry.key == *key) {
            entry.file = None;
        }
    }

    // ---- snapshot ---------------------------------------------------------------------------------------------------

    /// Returns the keys of everything that an upgrade would hand over.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &Key> {
        self.ours.iter().map(|entry| &entry.key).chain(self.producers.iter().map(|producer| &producer.key))
    }

    /// Returns everything that an upgrade hands over.
    pub(super) fn snapshot(&self) -> Vec<Entry> {
        // A later version may ask for an unclaimed socket of a unit.
        let unclaimed = self.inherited.iter().filter(|entry| entry.unit.is_some());
        self.ours.iter().chain(unclaimed).cloned().collect()
    }

    /// Returns what produces state when an upgrade begins, and what does so at its commit.
    pub(super) fn producers(&self) -> [Vec<Producer>; 2] {
        [false, true].map(|late| self.producers.iter().filter(|held| held.at_commit == late).cloned().collect())
    }

    /// Returns the connections and other descriptors that are not `known`.
    pub(super) fn passed_since(&self, known: &[Arc<OwnedFd>]) -> Vec<Entry> {
        let known: HashSet<_> = known.iter().map(Arc::as_ptr).collect();
        let ours = self.ours.iter().filter(|entry| matches!(entry.key.kind(), Kind::Stream | Kind::Fd));
        ours.filter(|entry| !known.contains(&Arc::as_ptr(&entry.fd))).cloned().collect()
    }

    /// Returns the files of Unix sockets that this process cannot replace or remove.
    pub(crate) fn out_of_reach(&self) -> Vec<PathBuf> {
        let files = self.ours.iter().filter(|entry| entry.file.is_some()).map(|entry| Path::new(entry.key.name()));
        files.filter(|path| listen::is_out_of_reach(path)).map(Path::to_owned).collect()
    }

    // ---- close ------------------------------------------------------------------------------------------------------

    /// Removes listeners that the next generation does not have, once this one is over.
    pub(crate) fn unlink_orphans(&self, orphans: &HashSet<u64>) {
        for entry in self.ours.iter().filter(|entry| orphans.contains(&entry.inode)) {
            unlink(entry);
        }
    }

    /// Drops every socket. A successor holds its own copies, and the program its own handles.
    pub(crate) fn close_all(&mut self) {
        self.ours.clear();
        self.producers.clear();
        self.inherited.clear();
    }

    /// At a stop, removes the files of the Unix sockets, unless the sockets survive in a store.
    pub(crate) fn unlink(&self, which: impl Fn(&Key) -> bool) {
        if self.store.is_some() {
            return;
        }
        self.ours.iter().filter(|entry| which(&entry.key)).for_each(unlink);
    }

    // ---- the service manager's store --------------------------------------------------------------------------------

    /// Inherits the state that an earlier stop has passed. The names are removed from the store when this process
    /// serves.
    #[cfg(all(feature = "systemd_notify", feature = "systemd_sockets"))]
    pub(crate) fn inherit_kept(&mut self, mut entries: Vec<Entry>, early: usize, names: Vec<String>) {
        self.kept_late = entries.split_off(early.min(entries.len()));
        self.kept_names = names;
        self.inherit(entries);
    }

    /// From now on `store` keeps a copy of every socket that is created here, and drops retired ones. It does not keep
    /// sockets of a unit.
    pub(crate) fn store_in(&mut self, store: Arc<dyn Store>) {
        // The store removes by name, and a current socket may have the same name, so remove first.
        for (key, file) in mem::take(&mut self.closed) {
            store.forget(&key, file);
        }
        mem::take(&mut self.kept_names).iter().for_each(|name| store.forget_passed(name));
        let own: Vec<_> =
            self.ours.iter().filter(|entry| entry.unit.is_none() && entry.key.kind().has_address()).collect();
        if own.len() > store.capacity() {
            logging::warn!("{} sockets, but FileDescriptorStoreMax= is {}", own.len(), store.capacity());
        }
        for entry in own {
            store.keep(&entry.key, entry.fd.as_fd(), entry.file);
        }
        self.store = Some(store);
    }
}

/// Removes the file of a Unix socket, if it still belongs to it.
fn unlink(entry: &Entry) {
    let Some(file) = entry.file else { return };
    let path = Path::new(entry.key.name());
    if let Err(e) = listen::unlink_if_ours(path, file) {
        logging::warn!("cannot remove {}: {e}", path.display());
    }
}
