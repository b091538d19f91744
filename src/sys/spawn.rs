//! Step 3 of an upgrade: creates the child by clone or fork. Both run the same child code.
//!
//! With clone, the child shares the parent's memory until execve, so the cost is the same for any heap size. Unlike
//! vfork(2), this does not suspend the parent: a child that is stopped, or whose execve hangs on a dead file system,
//! must not block the parent's deadline and triggers. fork(3) is for profiles that check clone's flags and for systems
//! without such a clone.
//!
//! In the child, before execve: no allocation, no lock, no panic, no Drop, no errno.

use std::ffi::{c_int, c_void, CStr};
use std::io::{self, Write};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::Pid;

use super::child::Process;
use super::plan::{IfMissing, Memory, Plan, SharedMemory};
use super::signal::{Blocked, Mask};
use super::system::clone::{self, Cloned};
use super::system::{calls, mask, sweep};
use super::Parentage;
use crate::logging;

/// How the new process is created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Spawn {
    /// `clone(CLONE_VM)` on Linux (x86-64, aarch64, riscv64), which takes the same time for any heap size. `fork` on
    /// other systems and processors, and if the kernel or a filter refuses the clone with an error, which is logged
    /// once.
    #[default]
    Auto,
    /// Only `fork`: for seccomp profiles that kill a process for unknown flags of clone. It copies page tables, which
    /// stalls every thread for 10 to 20 ms per GiB of touched memory.
    Fork,
}

/// How many times, and how many milliseconds apart, to retry a program file that is open for writing.
const BUSY_TRIES: u32 = 100;
const BUSY_PAUSE: std::ffi::c_long = 10;

/// Creates a child that executes the plan. Returns without waiting for its execve. A failure before that is reported as
/// a `failed` line on the plan's status descriptor.
pub(crate) fn spawn(plan: Plan, how: Spawn) -> io::Result<Process> {
    static LOGGED: AtomicBool = AtomicBool::new(false);
    let shared = SharedMemory::new(plan);
    let cloned = match how {
        Spawn::Auto if clone::WORKS => match clone(&shared.0) {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::ENOSYS | libc::EINVAL)) => {
                // Log this before there is a child, because a logger may panic.
                if !LOGGED.swap(true, Ordering::Relaxed) {
                    logging::warn!("clone with CLONE_VM refused, using fork error={e:?}");
                }
                fork(&shared.0)
            }
            other => other,
        },
        _ => fork(&shared.0),
    };
    let (pid, pidfd, parent) = cloned.map_err(explain)?;
    Ok(Process { pid: Pid::from_raw(pid), pidfd, parent, _memory: Some(shared) })
}

/// Adds a hint about the likely cause to an error of [`spawn`] or of a `failed` line.
pub(crate) fn explain(error: io::Error) -> io::Error {
    let hint = match error.raw_os_error() {
        Some(libc::EAGAIN) => "a limit on processes is reached: RLIMIT_NPROC of the user, or pids.max of the cgroup",
        Some(libc::ENOMEM) => "the kernel has no memory for another process: overcommit, or memory.max of the cgroup",
        Some(libc::ETXTBSY) => "the program's file has been open for writing for a second",
        Some(libc::E2BIG) => {
            "arguments and environment are larger than a quarter of RLIMIT_STACK, or one is over 128 KiB"
        }
        _ => return error,
    };
    io::Error::new(error.kind(), format!("{error}: {hint}"))
}

fn clone(memory: &Memory) -> io::Result<Cloned> {
    // The child must not run a handler of the parent. It lifts the mask once it has reset the handlers.
    let _blocked = Blocked::new(Mask::all())?;
    // SAFETY: `child` meets the conditions, and `memory` outlives the child's use of it, see `SharedMemory`.
    unsafe { memory.stack.clone(memory.plan.parent, child, ptr::from_ref(memory).cast_mut().cast()) }
}

fn fork(memory: &Memory) -> io::Result<Cloned> {
    let _blocked = Blocked::new(Mask::all())?;
    // SAFETY: the child runs only async-signal-safe code and never returns (fork(2)).
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => run(memory),
        pid => Ok((pid, Pid::from_raw(pid).and_then(clone::pidfd), Parentage::Us)),
    }
}

extern "C" fn child(memory: *mut c_void) -> c_int {
    // SAFETY: `clone` above passes this `memory`, which lives until our execve or exit.
    let memory = unsafe { &*memory.cast::<Memory>() };
    memory.stack.release_at_exec();
    run(memory)
}

/// Runs the child from fork to execve. Reports the step that failed.
fn run(memory: &Memory) -> ! {
    let (step, errno) = match prepare(memory) {
        Ok(()) => ("execve", execve(memory)),
        Err(failed) => failed,
    };
    let mut report = [0_u8; 32];
    let mut rest = &mut report[..];
    // The formatting of a number and the copy into a slice do not allocate.
    let _ = writeln!(rest, "failed {step} {errno}");
    let length = 32 - rest.len();
    // SAFETY: `report` holds `length` bytes.
    let _ = unsafe { calls::write(memory.plan.status, report.as_ptr(), length) };
    calls::exit(127)
}

/// Returns the name of the step that failed, and the errno.
fn prepare(memory: &Memory) -> Result<(), (&'static str, i32)> {
    let plan = &memory.plan;
    // SAFETY: this process has its own signal dispositions and descriptor table, because neither CLONE_SIGHAND nor
    // CLONE_FILES was requested.
    unsafe {
        mask::reset_all();
        sweep::sweep().map_err(|e| ("sweep", e))?;
    }
    match calls::chdir(&plan.directory.0) {
        Err(e) if plan.directory.1 == IfMissing::Fail => return Err(("chdir", e)),
        _ => {}
    }
    memory.restore.apply();
    for &fd in &plan.keep {
        // SAFETY: as above.
        unsafe { calls::set_fd_flags(fd as usize, 0).map_err(|e| ("keep", e))? };
    }
    mask::change(libc::SIG_SETMASK, plan.attributes.mask).map(drop).map_err(|e| ("sigmask", e))
}

/// Executes the program. A file that is open for writing (a copy that is just being closed, or another thread's child
/// before its execve) is usually available again within milliseconds.
fn execve(memory: &Memory) -> i32 {
    let program: &CStr = &memory.plan.program;
    let mut tries = 0;
    loop {
        // SAFETY: both arrays point into `memory` and end with null.
        let errno = unsafe { calls::execve(program, memory.argv.as_ptr(), memory.envp.as_ptr()) };
        if errno != libc::ETXTBSY || tries == BUSY_TRIES {
            return errno;
        }
        tries += 1;
        calls::pause(BUSY_PAUSE);
    }
}
