//! The unsafe code: the bare handover that serves as the baseline, and a few system calls.

use std::ffi::{c_char, c_void, CString};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::time::Duration;

/// How the bare handover creates its child.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Fork,
    /// As posix_spawn does: shared memory, and the parent waits for the execve.
    Vfork,
    /// Shared memory, and the parent continues.
    Vm,
}

/// The data that the child of a bare spawn reads before its execve.
struct Plan {
    program: CString,
    argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
    keep: Vec<RawFd>,
}

extern "C" fn child(plan: *mut c_void) -> i32 {
    // SAFETY: the plan lives until the execve, and there are only system calls from here on.
    unsafe {
        let plan = &*plan.cast::<Plan>();
        for &fd in &plan.keep {
            libc::fcntl(fd, libc::F_SETFD, 0);
        }
        libc::execve(plan.program.as_ptr(), plan.argv.as_ptr(), plan.envp.as_ptr());
        libc::_exit(127)
    }
}

/// The minimum that a handover needs: spawns a child that runs `program` and keeps `keep` open.
pub fn bare_spawn(way: Way, program: CString, argv: &[CString], envp: &[CString], keep: Vec<RawFd>) -> io::Result<i32> {
    let pointers =
        |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect::<Vec<*const c_char>>();
    // Leaked, because a child that shares memory may still read it after this returns. This process ends soon.
    let plan = Box::leak(Box::new(Plan { program, argv: pointers(argv), envp: pointers(envp), keep }));
    let plan = ptr::from_mut(plan).cast::<c_void>();
    let stack = if way == Way::Fork { ptr::null_mut() } else { new_stack()? };
    // SAFETY: the child runs only `child`, on its own stack or on a copy of the parent's.
    let pid = unsafe {
        match way {
            Way::Fork => match libc::fork() {
                0 => libc::_exit(child(plan)),
                pid => pid,
            },
            Way::Vfork => libc::clone(child, stack, libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD, plan),
            Way::Vm => libc::clone(child, stack, libc::CLONE_VM | libc::SIGCHLD, plan),
        }
    };
    if pid < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(pid)
    }
}

/// Returns the upper end of an untouched stack, so that the child causes page faults only for the pages it uses.
fn new_stack() -> io::Result<*mut c_void> {
    const SIZE: usize = 64 * 1024;
    // SAFETY: a new mapping, never unmapped; its end is aligned to a page.
    unsafe {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        match libc::mmap(ptr::null_mut(), SIZE, protection, flags | libc::MAP_STACK, -1, 0) {
            libc::MAP_FAILED => Err(io::Error::last_os_error()),
            start => Ok(start.byte_add(SIZE)),
        }
    }
}

pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: pipe2 fills in both on success, and nothing else owns them.
    unsafe {
        if libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])))
    }
}

/// Takes ownership of an inherited descriptor.
pub fn adopt<T: From<OwnedFd>>(fd: RawFd) -> T {
    // SAFETY: the bare parent handed this number over, and nothing else in this process uses it.
    T::from(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Returns CLOCK_MONOTONIC in nanoseconds, which is the same in every process.
pub fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Leaves a mark in a system call trace, by a write to an invalid descriptor.
pub fn mark(word: &str) {
    // SAFETY: -1 is not a descriptor, so the call fails.
    unsafe { libc::write(-1, word.as_ptr().cast(), word.len()) };
}

/// Memory in 4 KiB pages, every one of them touched.
pub struct Heap {
    start: *mut u8,
    len: usize,
}

// SAFETY: plain memory that only one thread writes to.
unsafe impl Send for Heap {}

impl Heap {
    pub const PAGE: usize = 4096;

    pub fn new(len: usize) -> io::Result<Self> {
        let len = len.max(Self::PAGE);
        // SAFETY: a private anonymous mapping of that length, never unmapped.
        unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let start = libc::mmap(ptr::null_mut(), len, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
            if start == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            libc::madvise(start, len, libc::MADV_NOHUGEPAGE);
            let mut heap = Self { start: start.cast(), len };
            for page in 0..len / Self::PAGE {
                heap.touch(page);
            }
            Ok(heap)
        }
    }

    /// Writes to the page with this number, modulo the number of pages.
    pub fn touch(&mut self, page: usize) {
        let at = page * Self::PAGE % self.len;
        // SAFETY: within the mapping.
        unsafe { self.start.add(at).write_volatile(1) };
    }
}

/// Blocks SIGHUP in this thread and the threads it creates. `wait_hangup` waits for the signal.
pub fn block_hangup() {
    // SAFETY: a valid set.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &hangup(), ptr::null_mut()) };
}

pub fn wait_hangup() {
    let mut signal = 0;
    // SAFETY: a valid set and an int.
    unsafe { libc::sigwait(&hangup(), &mut signal) };
}

fn hangup() -> libc::sigset_t {
    // SAFETY: sigemptyset initializes the set.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGHUP);
        set
    }
}

/// Makes orphaned descendants children of this process, so that none is left behind.
pub fn adopt_orphans() {
    // SAFETY: plain numbers.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
}

pub fn raise_descriptor_limit() {
    // SAFETY: one rlimit.
    unsafe {
        let mut limit = std::mem::zeroed();
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        limit.rlim_cur = limit.rlim_max;
        libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
    }
}

pub fn signal(pid: i32, signal: i32) {
    // SAFETY: plain numbers.
    unsafe { libc::kill(pid, signal) };
}

/// Waits for the end of a child, and reaps it. Returns false if it still runs.
pub fn reap(pid: i32, deadline: Duration) -> bool {
    // SAFETY: plain numbers and one pollfd. Nothing else owns the pidfd.
    unsafe {
        let pidfd = libc::syscall(libc::SYS_pidfd_open, pid, 0) as RawFd;
        if pidfd >= 0 {
            let pidfd = OwnedFd::from_raw_fd(pidfd);
            let mut fds = [libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 }];
            libc::poll(fds.as_mut_ptr(), 1, deadline.as_millis() as i32);
        }
        libc::waitpid(pid, ptr::null_mut(), libc::WNOHANG) != 0
    }
}

/// Waits until the descriptor is readable. Returns false at the deadline.
pub fn readable(fd: &impl AsRawFd, deadline: Duration) -> bool {
    let mut fds = [libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 }];
    // SAFETY: one pollfd.
    unsafe { libc::poll(fds.as_mut_ptr(), 1, deadline.as_millis() as i32) > 0 }
}

/// Returns the CPU time of this process, or of its reaped descendants, in seconds.
pub fn cpu_seconds(descendants: bool) -> f64 {
    let who = if descendants { libc::RUSAGE_CHILDREN } else { libc::RUSAGE_SELF };
    // SAFETY: one rusage.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(who, &mut usage);
        usage
    };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Makes a close of this stream reset the connection. Without TIME_WAIT the ports never run out.
pub fn reset_on_close(stream: &impl AsRawFd) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let size = std::mem::size_of_val(&linger) as u32;
    // SAFETY: a linger struct and its size.
    unsafe {
        let option = ptr::from_ref(&linger).cast();
        libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, option, size);
    }
}
