//! Step 3 of an upgrade: fork and execve, in two ways that run the same child code.
//!
//! The clone way shares the parent's memory until execve, so it costs the same at any heap size. Unlike vfork(2) it
//! does not suspend the parent: a child that is stopped, or whose execve hangs on a dead file system, must not take
//! the parent's deadline and triggers with it. The fork way is fork(3), for profiles that look at clone's flags.
//!
//! In the child, before execve: no allocation, no lock, no panic, no Drop, no errno.

use std::ffi::{c_char, c_int, c_void, CString};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::ioctl::{self, Opcode};
use rustix::process::{getpid, pidfd_open, PidfdFlags};

use super::raw::{self, call};
use super::signal::{self, Mask};
use super::sweep::{set_flags, sweep};

/// How the new process is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Spawn {
    /// `clone(CLONE_VM)`, and `fork` where the kernel or a filter refuses that with an error. Takes the same time at
    /// any heap size.
    #[default]
    Auto,
    /// `fork` alone: for seccomp profiles that end a process which calls clone with flags they do not know. Copies
    /// page tables: every thread stands still for 10 to 20 ms per GiB of touched memory.
    Fork,
}

/// The child needs a few KiB, more in a debug build.
const STACK: usize = 64 * 1024;

/// Everything the child needs, made before it exists.
pub(crate) struct Plan {
    pub(crate) program: CString,
    pub(crate) argv: Vec<CString>,
    pub(crate) envp: Vec<CString>,
    /// Where the child starts, and whether it may start where the parent stands now when that directory is gone.
    pub(crate) directory: Option<(CString, IfMissing)>,
    /// What survives the execve, besides stdin, stdout and stderr.
    pub(crate) keep: Vec<RawFd>,
    /// Where the child reports a failure before the new program runs. One of `keep`.
    pub(crate) status: RawFd,
    /// The signal mask of the new program.
    pub(crate) mask: Mask,
    /// Whose child it is to be.
    pub(crate) parent: Parentage,
}

/// Whose child a new process is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Parentage {
    /// Ours.
    Us,
    /// Our own parent's, where the kernel allows it; that reaps it then. For a service manager which at a stop waits for
    /// its own children only.
    OurParent,
}

/// Whether a missing directory is an error or means "stay where we are".
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum IfMissing {
    Fail,
    Stay,
}

/// A child process.
pub(crate) struct Spawned {
    pub(crate) pid: rustix::process::Pid,
    /// Readable once the child has ended. `None` where the kernel did not give one.
    pub(crate) pidfd: Option<OwnedFd>,
    pub(crate) parent: Parentage,
    /// What the child still reads until its execve.
    _shared: SharedMemory,
}

/// Makes a child that executes the plan. Returns without waiting for its execve; what fails before that comes as a
/// `failed` line over the plan's status descriptor.
pub(crate) fn spawn(plan: Plan, how: Spawn) -> io::Result<Spawned> {
    let shared = SharedMemory::new(plan);
    // The child must not run a handler of the parent's; it lifts the mask when it has reset them.
    let mask = signal::block_all()?;
    let spawned = match how {
        Spawn::Auto if raw::LEAVES_ERRNO_ALONE => match clone(&shared.0) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::ENOSYS | libc::EINVAL)) => fork(&shared.0),
            other => other,
        },
        _ => fork(&shared.0),
    };
    // A filter may refuse it; then there is a child all the same, and the caller must have it.
    if let Err(e) = signal::set_mask(mask) {
        log::error!("cannot unblock signals after a spawn: {e}");
    }
    let (pid, pidfd, parent) = spawned?;
    let pid = rustix::process::Pid::from_raw(pid).ok_or(io::ErrorKind::Other)?;
    Ok(Spawned { pid, pidfd, parent, _shared: shared })
}

/// The sibling way first, where it is wanted. The first process of a PID namespace cannot have siblings (EINVAL). Without
/// a pidfd we could neither see nor surely end what is not our child.
fn clone(memory: &Memory) -> io::Result<Made> {
    let pidfds = || pidfd_open(getpid(), PidfdFlags::empty()).is_ok();
    if memory.plan.parent == Parentage::OurParent && pidfds() {
        if let Ok((pid, Some(pidfd))) = clone_with(memory, libc::CLONE_PARENT) {
            return Ok((pid, Some(pidfd), Parentage::OurParent));
        }
    }
    clone_with(memory, 0).map(|(pid, pidfd)| (pid, pidfd, Parentage::Us))
}

type Made = (c_int, Option<OwnedFd>, Parentage);

fn clone_with(memory: &Memory, flags: c_int) -> io::Result<(c_int, Option<OwnedFd>)> {
    let mut pidfd: RawFd = -1;
    memory.in_use.store(1, Ordering::Relaxed);
    let flags = flags | libc::CLONE_VM | libc::CLONE_CHILD_CLEARTID | libc::CLONE_PIDFD | libc::SIGCHLD;
    // SAFETY: the stack's top is aligned and belongs to this child alone; `child` touches no thread-local storage and
    // never returns; `memory` outlives the child's use of it, see `SharedMemory::drop` (clone(2)).
    let pid = unsafe {
        let top = memory.stack.as_ptr().add(STACK);
        let top = (top as usize & !15) as *mut c_void;
        libc::clone(
            child,
            top,
            flags,
            ptr::from_ref(memory).cast_mut().cast(),
            &raw mut pidfd,
            ptr::null_mut::<c_void>(),
            memory.in_use.as_ptr(),
        )
    };
    if pid < 0 {
        let error = io::Error::last_os_error();
        memory.in_use.store(0, Ordering::Relaxed);
        return Err(error);
    }
    // SAFETY: the kernel made this descriptor for this call (CLONE_PIDFD); kernels that do not know the flag leave -1.
    Ok((pid, (pidfd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(pidfd) })))
}

fn fork(memory: &Memory) -> io::Result<Made> {
    // SAFETY: the child runs async-signal-safe code only and never returns (fork(2)).
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => run(memory),
        pid => Ok((pid, None, Parentage::Us)),
    }
}

/// How a process ended that somebody else has reaped. `None` before Linux 6.15, and while it is not reaped.
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
    // SAFETY: PIDFD_GET_INFO takes a structure of the size that its number says, and writes no more than that.
    unsafe { ioctl::ioctl(pidfd, ioctl::Updater::<GET_INFO, Info>::new(&mut info)) }.ok()?;
    (info.mask & EXIT != 0).then(|| ExitStatus::from_raw(info.exit_code))
}

extern "C" fn child(memory: *mut c_void) -> c_int {
    // SAFETY: `memory` is what `clone` above passes, alive until our execve or exit.
    run(unsafe { &*memory.cast::<Memory>() })
}

/// The child, from fork to execve.
fn run(memory: &Memory) -> ! {
    let plan = &memory.plan;
    let (step, errno) = match execute(memory) {
        Ok(()) => ("execve", 0),
        Err(failure) => failure,
    };
    let mut report = [0_u8; 32];
    let length = failed_line(&mut report, step, errno);
    // SAFETY: `report` holds `length` bytes; exit_group does not return.
    unsafe {
        let _ = call(libc::SYS_write, [plan.status as usize, report.as_ptr() as usize, length, 0]);
        loop {
            let _ = call(libc::SYS_exit_group, [127, 0, 0, 0]);
        }
    }
}

/// Returns only if a step failed, with the step's name and the errno.
fn execute(memory: &Memory) -> Result<(), (&'static str, i32)> {
    let plan = &memory.plan;
    // SAFETY: this process's signal dispositions and descriptor table are its own, because neither CLONE_SIGHAND nor
    // CLONE_FILES was asked for; every pointer leads into `memory`.
    unsafe {
        signal::reset_all();
        sweep().map_err(|e| ("sweep", e))?;
        if let Some((directory, if_missing)) = &plan.directory {
            match call(libc::SYS_chdir, [directory.as_ptr() as usize, 0, 0, 0]) {
                Err(libc::ENOENT) if *if_missing == IfMissing::Stay => {}
                Err(e) => return Err(("chdir", e)),
                Ok(_) => {}
            }
        }
        for &fd in &plan.keep {
            set_flags(fd as usize, 0).map_err(|e| ("keep", e))?;
        }
        signal::set_mask_raw(plan.mask).map_err(|e| ("sigmask", e))?;
        let argv = memory.argv.as_ptr() as usize;
        let envp = memory.envp.as_ptr() as usize;
        call(libc::SYS_execve, [plan.program.as_ptr() as usize, argv, envp, 0]).map(drop).map_err(|e| ("execve", e))
    }
}

/// Writes `failed STEP ERRNO\n`, the status line for a failure before the new program runs.
fn failed_line(buffer: &mut [u8; 32], step: &str, errno: i32) -> usize {
    let mut digits = [0_u8; 10];
    let mut first = digits.len();
    let mut rest = errno.unsigned_abs();
    loop {
        first -= 1;
        digits[first] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    let mut length = 0;
    for part in [b"failed ", step.as_bytes(), b" ", &digits[first..], b"\n"] {
        for &byte in part {
            if let Some(slot) = buffer.get_mut(length) {
                *slot = byte;
                length += 1;
            }
        }
    }
    length
}

/// What the child reads before its execve, and the stack it runs on.
struct Memory {
    plan: Plan,
    /// The pointers that execve takes, into `plan`, null at the end.
    argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
    /// Room of [`STACK`] bytes, not touched before the child does: to zero it would be 16 page faults.
    stack: Vec<u8>,
    /// Not 0 while a child may read this memory; the kernel clears it at execve or exit (CLONE_CHILD_CLEARTID).
    in_use: AtomicU32,
}

/// Gives the memory back only when no child uses it any more.
struct SharedMemory(ManuallyDrop<Box<Memory>>);

// SAFETY: the raw pointers lead into `plan`, which moves with them and which nobody changes.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    fn new(plan: Plan) -> Self {
        let pointers = |strings: &[CString]| {
            let mut pointers: Vec<*const c_char> = strings.iter().map(|s| s.as_ptr()).collect();
            pointers.push(ptr::null());
            pointers
        };
        Self(ManuallyDrop::new(Box::new(Memory {
            argv: pointers(&plan.argv),
            envp: pointers(&plan.envp),
            plan,
            stack: Vec::with_capacity(STACK),
            in_use: AtomicU32::new(0),
        })))
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // A child that is stuck before its execve, and survived even SIGKILL, still reads this: then it is leaked.
        if self.0.in_use.load(Ordering::Acquire) == 0 {
            // SAFETY: nobody uses the memory any more, and this is the only drop.
            unsafe { ManuallyDrop::drop(&mut self.0) }
        }
    }
}
