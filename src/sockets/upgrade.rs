//! The sockets in an upgrade: what the parent hands over, and what the child does before and at the commit.

use std::io;

use super::late::Late;
use super::producer::Producer;
use super::Sockets;
use crate::error::Error;
use crate::handover::entry::Entry;
use crate::handover::receive;
use crate::logging;

impl Sockets {
    /// Closes unclaimed sockets, and returns the inodes of the listeners among them, which the parent serves until it
    /// is over.
    pub(crate) fn close_unclaimed(&self) -> Result<Vec<u64>, Error> {
        let mut lines = Vec::new();
        let dropped = self.registry().close_unclaimed(&mut lines)?;
        // Log without the lock, because the logger belongs to the program.
        for (level, line) in lines {
            logging::write(level, format_args!("{line}"));
        }
        Ok(dropped)
    }

    /// Returns everything that an upgrade hands over when it begins, and what must be sent at its commit. State is
    /// produced now, so that it is current.
    pub(crate) fn snapshot(&self) -> Result<(Vec<Entry>, Option<Late>), Error> {
        let [now, late] = self.registry().producers();
        let produced = now.iter().map(Producer::produce).collect::<Result<Vec<_>, _>>()?;
        let mut entries = self.registry().snapshot();
        entries.extend(produced);
        if late.is_empty() {
            return Ok((entries, None));
        }
        let late = Late::new(late, &mut entries).map_err(Error::prepare("socket for the state at the commit"))?;
        Ok((entries, Some(late)))
    }

    /// At the commit, starts to listen on new listeners, and receives what the parent has sent for this moment.
    ///
    /// # Errors
    ///
    /// [`Error::Socket`] with the error of listen(2).
    pub(crate) fn begin_serving(&self) -> Result<(), Error> {
        self.registry().start_listening()?;
        let Some(late) = self.registry().late.take() else { return Ok(()) };
        let received =
            receive::receive_late(&late).and_then(|arrived| arrived.into_entries().map_err(io::Error::other));
        match received {
            Ok(entries) => self.registry().inherit(entries),
            Err(e) => {
                self.registry().late_is_incomplete = true;
                logging::warn!("cannot receive what the parent hands over at the commit: {e}");
            }
        }
        Ok(())
    }

    /// At the commit, sends what is handed over only now.
    pub(crate) fn send_late(&self, late: Late, generation: u64) -> Result<(), Error> {
        late.send(&self.registry, generation)
    }
}
