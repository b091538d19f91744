//! The choices for the next generation: the program, its arguments, environment and directory.

use std::error::Error as StdError;
use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;

use super::Builder;
use crate::program::Changes;

impl Builder {
    /// Sets the program that the next generation runs. A relative path starts at the directory in which this process
    /// was started. Links are not resolved. Default: the program of `argv[0]`, resolved at [`start`](Self::start) in
    /// the same way.
    pub fn exec(&mut self, program: impl AsRef<Path>) -> &mut Self {
        self.changes.exec(program);
        self
    }

    /// Sets the next generation's arguments, without `argv[0]`. Default: the arguments of this process.
    pub fn args(&mut self, args: impl IntoIterator<Item = impl Into<OsString>>) -> &mut Self {
        self.changes.args(args);
        self
    }

    /// Sets a variable in the next generation's environment, which is otherwise this process's environment at the time
    /// of the upgrade.
    pub fn env(&mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> &mut Self {
        self.changes.env(name, value);
        self
    }

    /// Removes a variable from the next generation's environment.
    pub fn env_remove(&mut self, name: impl Into<OsString>) -> &mut Self {
        self.changes.env_remove(name);
        self
    }

    /// Sets the directory in which the next generation starts. Default: the directory in which this process was
    /// started, or its current directory if that one is gone.
    pub fn current_dir(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.changes.current_dir(path);
        self
    }

    /// For tests of programs that use this library. The service handles no signal, ignores the environment, has no
    /// parent, takes nothing over, uses no service manager, and cannot be upgraded
    /// ([`upgrade`](crate::Ecdysis::upgrade) returns an error). So a process may have any number of them.
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
        self.options.standalone = true;
        self
    }

    /// Calls `choose` at each upgrade, before the child exists, to choose its program, arguments and environment. Its
    /// changes are applied after the builder's choices, and only for this upgrade. A takeover does not call it, because
    /// the other process already runs. It should return quickly, because no trigger is handled before that.
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
        self.options.before_upgrade = Some(Arc::new(choose));
        self
    }
}
