//! Creates a process with clone(2) that shares the memory of its parent until it executes another program.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::ioctl::{self, Opcode};
use rustix::process::{getpid, pidfd_open, pidfd_send_signal, waitid, Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};

use super::calls::{self, call};
use crate::sys::stdio::above_stdio;
use crate::sys::Parentage;

/// Whether a child can share the memory of its parent on this system. It must not write the parent's `errno`.
pub(crate) const WORKS: bool = calls::LEAVES_ERRNO_ALONE;

/// The child needs a few KiB, more in a debug build.
const SIZE: usize = 64 * 1024;

/// The stack of the child.
pub(crate) struct Stack {
    /// [`SIZE`] bytes, which are not touched before the child uses them, because zeroing them would cause 16 page
    /// faults.
    room: Vec<u8>,
    /// Not 0 while a child may use the stack and the other memory of its parent that it reads.
    in_use: AtomicU32,
}

/// A child, the descriptor that polls as readable once it has ended, and its parent.
pub(crate) type Cloned = (c_int, Option<OwnedFd>, Parentage);

impl Stack {
    pub(crate) fn new() -> Self {
        Self { room: Vec::with_capacity(SIZE), in_use: AtomicU32::new(0) }
    }

    pub(crate) fn is_in_use(&self) -> bool {
        self.in_use.load(Ordering::Acquire) != 0
    }

    /// Creates a child that runs `child(argument)` on this stack. It becomes a child of our own parent only if
    /// that is possible: the first process of a PID namespace cannot have siblings (EINVAL), and without a pidfd this
    /// process could neither watch nor end a process that is not its child.
    ///
    /// # Safety
    ///
    /// `child` calls [`release_at_exec`](Self::release_at_exec) first, uses no thread-local storage and does not
    /// return. The data behind `argument`, and this stack, live until [`is_in_use`](Self::is_in_use) is false.
    pub(crate) unsafe fn clone(
        &self,
        parent: Parentage,
        child: extern "C" fn(*mut c_void) -> c_int,
        argument: *mut c_void,
    ) -> io::Result<Cloned> {
        let is_sibling = parent == Parentage::OurParent && pidfd_open(getpid(), PidfdFlags::empty()).is_ok();
        let mut pidfd: RawFd = -1;
        self.in_use.store(1, Ordering::Relaxed);
        let (parent, flag) = if is_sibling { (parent, libc::CLONE_PARENT) } else { (Parentage::Us, 0) };
        let flags = flag | libc::CLONE_VM | libc::CLONE_PIDFD | libc::SIGCHLD;
        // SAFETY: the top of the stack is aligned, and only this child uses the stack (clone(2)). The rest is as for
        // this function.
        let pid = unsafe {
            let top = self.room.as_ptr().add(SIZE);
            let top = (top as usize & !15) as *mut c_void;
            libc::clone(child, top, flags, argument, &raw mut pidfd)
        };
        if pid < 0 {
            let error = io::Error::last_os_error();
            self.in_use.store(0, Ordering::Relaxed);
            // SAFETY: as for this function; there is no child yet.
            return if is_sibling { unsafe { self.clone(Parentage::Us, child, argument) } } else { Err(error) };
        }
        // SAFETY: the kernel created this descriptor for this call. Kernels that do not know CLONE_PIDFD leave -1.
        let pidfd = (pidfd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(pidfd) });
        Ok((pid, pidfd.and_then(|pidfd| above_stdio(pidfd).ok()), parent))
    }

    /// Call this in the child. Makes the kernel mark the stack as free when this process executes a program or ends.
    /// (The flag CLONE_CHILD_CLEARTID does the same from the start, but musl's clone refuses it. A child that is killed
    /// before this call leaks its stack.)
    pub(crate) fn release_at_exec(&self) {
        // SAFETY: the kernel writes four bytes there (set_tid_address(2)), and the parent frees them only after that.
        let _ = unsafe { call(libc::SYS_set_tid_address, [self.in_use.as_ptr() as usize, 0, 0, 0]) };
    }
}

/// Returns a descriptor that polls as readable once the child `pid` has ended. `None` before Linux 5.3.
pub(crate) fn pidfd(pid: Pid) -> Option<OwnedFd> {
    pidfd_open(pid, PidfdFlags::empty()).and_then(above_stdio).ok()
}

/// Sends SIGKILL. If a filter refuses this, use the older call, kill(2).
pub(crate) fn kill(pidfd: &OwnedFd) -> rustix::io::Result<()> {
    pidfd_send_signal(pidfd, Signal::KILL)
}

/// Reaps the child if it has ended; false if it has not, or a debugger has yet to see its end.
pub(crate) fn reap(pidfd: &OwnedFd) -> rustix::io::Result<bool> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    waitid(WaitId::PidFd(pidfd.as_fd()), options).map(|status| status.is_some())
}

/// Returns the exit status of a process that another process has reaped. `None` before Linux 6.15, and while it is not reaped.
pub(crate) fn exit_status(pidfd: &OwnedFd) -> Option<ExitStatus> {
    /// `struct pidfd_info` in its first version.
    #[repr(C)]
    struct Info {
        mask: u64,
        cgroup: u64,
        ids: [u32; 11],
        exit_code: i32,
    }
    const EXIT: u64 = 1 << 3;
    const GET_INFO: Opcode = ioctl::opcode::read_write::<Info>(0xff, 11);
    let mut info = Info { mask: EXIT, cgroup: 0, ids: [0; 11], exit_code: 0 };
    // SAFETY: PIDFD_GET_INFO expects a structure of the size in its number, and writes no more than that.
    unsafe { ioctl::ioctl(pidfd, ioctl::Updater::<GET_INFO, Info>::new(&mut info)) }.ok()?;
    (info.mask & EXIT != 0).then(|| ExitStatus::from_raw(info.exit_code))
}
