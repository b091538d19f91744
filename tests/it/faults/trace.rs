//! A ptrace(2) tracer that makes one chosen system call of an upgrade fail, or sends a signal at it, and then detaches.
//!
//! strace's `inject=` counts occurrences per thread, so one rule causes several faults: in the parent, before execve
//! and in the new program. This tracer causes exactly one.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::ptr;
use std::thread;
use std::time::{Duration, Instant};

/// The process that makes a system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// The old process's thread that upgrades.
    Parent,
    /// The new process before its execve.
    Forked,
    /// The new program, until it has sent `serving`.
    Child,
}

/// A system call of an upgrade: the `nth` one of that number in that role, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Call {
    pub role: Role,
    pub number: i64,
    pub nth: usize,
    /// The command of an fcntl.
    pub argument: u64,
    /// The descriptor is a pipe or a socket.
    pub pipe: bool,
    /// The new program has sent `ready`, or the parent has sent `commit`.
    pub late: bool,
}

#[derive(Clone, Copy, Debug)]
#[allow(dead_code)] // The seccomp test only observes.
pub enum Fault {
    Errno(i32),
    Signal(i32),
}

/// The observations of the tracer.
#[derive(Debug, Default)]
pub struct Seen {
    pub calls: Vec<Call>,
    pub child: Option<i32>,
    /// The fault was injected.
    pub hit: Option<Call>,
}

struct Tracer {
    parent: i32,
    tids: HashSet<i32>,
    /// Detached or ended.
    gone: HashSet<i32>,
    executed: bool,
    asked: bool,
    said_ready: bool,
    said_serving: bool,
    committed: bool,
    parent_done: bool,
    child_done: bool,
    counts: HashMap<(Role, i64), usize>,
    seen: Seen,
}

const OPTIONS: i32 = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACEEXEC
    | libc::PTRACE_O_EXITKILL;

const WAIT: i32 = libc::__WALL | libc::__WNOTHREAD;

/// Traces `parent` through the upgrade that `ask` requests, until the fault is injected or `done` returns true.
/// `before_kill` is called before a kill, while the thread that makes the call is stopped and all others run. Call this
/// in the thread that may trace. It leaves children of other threads alone.
pub fn upgrade(
    parent: i32,
    fault: Option<(Call, Fault)>,
    ask: impl FnOnce(),
    mut before_kill: impl FnMut(u32),
    done: impl Fn() -> bool,
    deadline: Instant,
) -> io::Result<Seen> {
    let mut tracer = Tracer {
        parent,
        tids: HashSet::new(),
        gone: HashSet::new(),
        executed: false,
        asked: false,
        said_ready: false,
        said_serving: false,
        committed: false,
        parent_done: false,
        child_done: false,
        counts: HashMap::new(),
        seen: Seen::default(),
    };
    let mut to_resume = Vec::new();
    for task in fs::read_dir(format!("/proc/{parent}/task"))? {
        let tid: i32 = task?.file_name().to_str().and_then(|tid| tid.parse().ok()).ok_or(io::ErrorKind::Other)?;
        if ptrace(libc::PTRACE_SEIZE, tid, 0, OPTIONS as usize) == 0 {
            tracer.tids.insert(tid);
            ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0);
            to_resume.push(tid);
        } else if tid == parent {
            return Err(io::Error::last_os_error());
        }
    }
    ask();
    let mut injecting = None;
    loop {
        let mut status = 0;
        // SAFETY: `status` is a local variable.
        let tid = unsafe { libc::waitpid(-1, &mut status, WAIT) };
        if tid < 0 {
            match io::Error::last_os_error().raw_os_error() {
                Some(libc::EINTR) => continue,
                _ => break,
            }
        }
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            tracer.forget(tid);
            continue;
        }
        tracer.know(tid);
        let mut pass = tracer.event(tid, status);
        if libc::WSTOPSIG(status) == libc::SIGTRAP | 0x80 {
            let info = syscall_info(tid);
            if info.op == ENTRY {
                if let (None, Some(call)) = (&injecting, tracer.entry(tid, &info)) {
                    tracer.seen.calls.push(call);
                    if let Some((at, fault)) =
                        fault.filter(|(at, _)| (at.role, at.number, at.nth) == (call.role, call.number, call.nth))
                    {
                        tracer.seen.hit = Some(at);
                        match fault {
                            Fault::Signal(signal) => {
                                let process = tracer.process(tid);
                                if signal == libc::SIGKILL {
                                    tracer.detach_all_but(Some(tid));
                                    before_kill(process as u32);
                                }
                                // SAFETY: plain numbers. This thread traces the process, which is stopped.
                                unsafe { libc::kill(process, signal) };
                                // Another thread may receive the signal, and then waits for the tracer. If the thread
                                // that makes the call were released first, or before the other has run again, it could
                                // finish the upgrade before the process stops.
                                tracer.detach_all_but(Some(tid));
                                if signal == libc::SIGSTOP {
                                    wait_stopped(process, tid);
                                }
                                // The tracer must wait for the end of a killed process. Otherwise its own parent does
                                // not see it.
                                if signal != libc::SIGKILL {
                                    tracer.detach(tid, 0);
                                }
                                break;
                            }
                            Fault::Errno(errno) => {
                                // With number -1 the kernel does nothing. At the exit of the call, the tracer sets the
                                // result.
                                change(tid, |registers| registers.orig_rax = u64::MAX);
                                injecting = Some((tid, errno));
                            }
                        }
                    }
                }
            } else if info.op == EXIT {
                if let Some((_, errno)) = injecting.filter(|(at, _)| *at == tid) {
                    change(tid, |registers| registers.rax = -i64::from(errno) as u64);
                    tracer.detach(tid, 0);
                    break;
                }
                tracer.exit(tid, &info);
            }
            pass = 0;
        }
        if done() || Instant::now() > deadline {
            tracer.detach(tid, pass);
            break;
        }
        ptrace(libc::PTRACE_SYSCALL, tid, 0, pass as usize);
    }
    tracer.detach_all_but(None);
    Ok(tracer.seen)
}

impl Tracer {
    fn process(&self, tid: i32) -> i32 {
        crate::support::try_status_field(tid as u32, "Tgid").map_or(tid, |tgid| tgid.parse().unwrap())
    }

    fn know(&mut self, tid: i32) {
        if self.tids.insert(tid) && self.process(tid) == tid && tid != self.parent && self.seen.child.is_none() {
            self.seen.child = Some(tid);
        }
    }

    /// Handles all other events. Returns the signal to deliver.
    fn event(&mut self, tid: i32, status: i32) -> i32 {
        let signal = libc::WSTOPSIG(status);
        match status >> 16 {
            libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK => {
                let mut new: libc::c_ulong = 0;
                ptrace(libc::PTRACE_GETEVENTMSG, tid, 0, &raw mut new as usize);
                // A short-lived thread may have come and gone before its parent's event arrives.
                if !self.gone.contains(&(new as i32)) {
                    self.know(new as i32);
                }
                0
            }
            libc::PTRACE_EVENT_EXEC => {
                self.executed |= Some(tid) == self.seen.child;
                0
            }
            0 if signal == libc::SIGTRAP | 0x80 => 0,
            0 => {
                self.asked |= signal == libc::SIGHUP;
                signal
            }
            _ => 0,
        }
    }

    /// Returns the call, if it belongs to the upgrade.
    fn entry(&mut self, tid: i32, info: &SyscallInfo) -> Option<Call> {
        let number = info.data[0] as i64;
        let [fd, text, length] = [info.data[1], info.data[2], info.data[3]];
        let mut start = [0_u8; 8];
        if number == libc::SYS_write {
            peek(tid, text, &mut start);
            if fd <= 2 {
                // These are the program's own lines. The verdict, which the observer's thread writes while the upgrade
                // waits for it, is the end of the upgrade.
                self.parent_done |= Some(tid) != self.seen.child && &start == b"upgrade ";
                return None;
            }
        }
        let role = match (tid == self.parent, Some(tid) == self.seen.child) {
            (true, _) if self.asked && !self.parent_done => Role::Parent,
            (_, true) if !self.executed => Role::Forked,
            (_, true) if !self.child_done => Role::Child,
            _ => return None,
        };
        if number == libc::SYS_write {
            self.said_ready |= role == Role::Child && length == 6 && start.starts_with(b"ready\n");
            self.said_serving |= role == Role::Child && &start == b"serving\n";
            self.committed |= role == Role::Parent && start.starts_with(b"commit\n");
        }
        let to = fs::read_link(format!("/proc/{tid}/fd/{fd}")).unwrap_or_default();
        if to.to_string_lossy().starts_with("anon_inode:[eventfd]")
            && [libc::SYS_read, libc::SYS_write].contains(&number)
        {
            // A write to an eventfd fails only when its count overflows. It happens in a signal handler, which may run
            // in any thread.
            return None;
        }
        let pipe = ["pipe:", "socket:"].iter().any(|kind| to.to_string_lossy().starts_with(kind));
        let nth = self.counts.entry((role, number)).or_default();
        *nth += 1;
        let late = if role == Role::Parent { self.committed } else { self.said_ready };
        Some(Call { role, number, nth: *nth, argument: text, pipe, late })
    }

    fn exit(&mut self, tid: i32, info: &SyscallInfo) {
        if Some(tid) == self.seen.child && self.said_serving && info.data[0] == 8 {
            self.child_done = true;
        }
    }

    fn detach(&mut self, tid: i32, signal: i32) {
        ptrace(libc::PTRACE_DETACH, tid, 0, signal as usize);
        self.forget(tid);
    }

    fn detach_all_but(&mut self, kept: Option<i32>) {
        for &tid in self.tids.iter().filter(|tid| Some(**tid) != kept) {
            ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0);
        }
        while self.tids.iter().any(|tid| Some(*tid) != kept) {
            let mut status = 0;
            // SAFETY: `status` is a local variable.
            let tid = unsafe { libc::waitpid(-1, &mut status, WAIT) };
            if tid < 0 {
                break;
            }
            if libc::WIFSTOPPED(status) {
                let signal = self.event(tid, status);
                self.detach(tid, signal);
            } else {
                self.forget(tid);
            }
        }
    }

    fn forget(&mut self, tid: i32) {
        self.tids.remove(&tid);
        self.gone.insert(tid);
    }
}

/// Waits until all threads of a process but this one have stopped, as long as a loaded machine may need for that.
fn wait_stopped(process: i32, but: i32) {
    let until = Instant::now() + Duration::from_secs(10);
    let others = || fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let tids = || others().filter_map(|task| task.file_name().to_str()?.parse::<i32>().ok()).filter(|tid| *tid != but);
    while tids().any(|tid| !matches!(crate::support::state(tid as u32), None | Some('T' | 'Z' | 'X')))
        && Instant::now() < until
    {
        thread::yield_now();
    }
}

/// The type of a request differs between the C libraries.
fn ptrace(request: impl TryInto<i32>, tid: i32, address: usize, data: usize) -> i64 {
    let request = request.try_into().unwrap_or_default();
    // SAFETY: the callers pass the arguments that each request needs (ptrace(2)), and only the tracee's memory is
    // changed.
    unsafe { libc::ptrace(request as _, tid, address, data) as i64 }
}

fn change(tid: i32, change: impl FnOnce(&mut libc::user_regs_struct)) {
    let mut registers = std::mem::MaybeUninit::<libc::user_regs_struct>::zeroed();
    ptrace(libc::PTRACE_GETREGS, tid, 0, registers.as_mut_ptr() as usize);
    // SAFETY: plain numbers, all of which may be zero.
    let mut registers = unsafe { registers.assume_init() };
    change(&mut registers);
    ptrace(libc::PTRACE_SETREGS, tid, 0, &raw const registers as usize);
}

const ENTRY: u8 = 1;
const EXIT: u8 = 2;

/// The kernel's ptrace_syscall_info: number and arguments at the entry, the result at the exit.
#[repr(C)]
#[derive(Default)]
struct SyscallInfo {
    op: u8,
    pad: [u8; 3],
    arch: u32,
    instruction_pointer: u64,
    stack_pointer: u64,
    data: [u64; 8],
}

fn syscall_info(tid: i32) -> SyscallInfo {
    let mut info = SyscallInfo::default();
    ptrace(0x420e, tid, size_of::<SyscallInfo>(), &raw mut info as usize);
    info
}

fn peek(tid: i32, address: u64, into: &mut [u8]) {
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    for length in [into.len(), 6] {
        let remote = libc::iovec { iov_base: ptr::without_provenance_mut(address as usize), iov_len: length };
        // SAFETY: reads the tracee, and writes at most the length of `into`.
        if unsafe { libc::process_vm_readv(tid, &local, 1, &remote, 1, 0) } > 0 {
            break;
        }
    }
}
