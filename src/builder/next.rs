//! What a program chooses for its next generation: the program, its arguments, environment and directory.

use std::error::Error as StdError;
use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;

use super::Builder;
use crate::program::Changes;

impl Builder {
    /// The program that the next generation runs. A relative path starts at the directory of this process's start; no
    /// link is followed. Default: what `argv[0]` means, resolved at [`start`](Self::start) in the same way.
    pub fn exec(&mut self, program: impl AsRef<Path>) -> &mut Self {
        self.changes.exec(program);
        self
    }

    /// The next generation's arguments, without `argv[0]`. Default: this one's.
    pub fn args(&mut self, args: impl IntoIterator<Item = impl Into<OsString>>) -> &mut Self {
        self.changes.args(args);
        self
    }

    /// Sets a variable in the next generation's environment, which is otherwise this one's at the time of the upgrade.
    pub fn env(&mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> &mut Self {
        self.changes.env(name, value);
        self
    }

    /// Leaves a variable out of the next generation's environment.
    pub fn env_remove(&mut self, name: impl Into<OsString>) -> &mut Self {
        self.changes.env_remove(name);
        self
    }

    /// Where the next generation starts. Default: where this one started, or, if that directory is gone, where it is.
    pub fn current_dir(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.changes.current_dir(path);
        self
    }

    /// For tests of a program that uses this library: the service handles no signal, ignores the environment, is nobody's
    /// child, takes nothing over, uses no service manager, and cannot be upgraded
    /// ([`upgrade`](crate::Ecdysis::upgrade) is an error). So a process may have any number of them.
    ///
    /// ```
    /// # fn main() -> Result<(), ecdysis::Error> {
    /// let new = || ecdysis::Ecdysis::builder().standalone().start()?.ready();
    /// let (first, second) = (new()?, new()?);
    /// first.stop();
    /// assert!(first.shutdown().is_over() && !second.shutdown().is_over());
    /// # Ok(())
    /// # }
    /// ```
    pub fn standalone(&mut self) -> &mut Self {
        self.standalone = true;
        self
    }

    /// Calls `choose` at each upgrade, before the child exists, to choose what it runs: the program, its arguments, its
    /// environment. What it changes comes on top of what the builder was given, and holds for this upgrade only. A
    /// takeover does not call it, because the other process runs already. Return soon: meanwhile no trigger is
    /// handled.
    ///
    /// ```
    /// # let mut builder = ecdysis::Ecdysis::builder();
    /// builder.before_upgrade(|next| {
    ///     // The file may have changed since this process started.
    ///     for line in std::fs::read_to_string("/etc/default/app")?.lines() {
    ///         if let Some((name, value)) = line.split_once('=') {
    ///             next.env(name, value);
    ///         }
    ///     }
    ///     Ok(())
    /// });
    /// ```
    ///
    /// # Errors
    ///
    /// An error that `choose` returns, or a panic in it, is a failed upgrade ([`Error::Prepare`](crate::Error::Prepare)).
    pub fn before_upgrade(
        &mut self,
        choose: impl Fn(&mut Changes) -> Result<(), Box<dyn StdError + Send + Sync>> + Send + Sync + 'static,
    ) -> &mut Self {
        self.before_upgrade = Some(Arc::new(choose));
        self
    }
}
