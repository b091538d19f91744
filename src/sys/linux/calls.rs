//! System calls that use no thread-local storage.
//!
//! The child of a `clone(CLONE_VM)` shares memory, and so `errno`, with the thread that created it and that continues
//! to run. libc's wrappers write `errno`. These functions return the error as a value.

use std::ffi::{c_char, c_int, c_long, CStr};

/// Whether this file has a system call for this architecture that leaves `errno` alone. A sanitizer's runtime has more
/// thread-local storage, and would use it in two processes at the same time (tests/sanitizers.sh sets the cfg).
pub(crate) const LEAVES_ERRNO_ALONE: bool =
    cfg!(all(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64"), not(sanitized)));

/// Makes the system call `number` and returns its result, or the errno as the error.
///
/// # Safety
///
/// The arguments must be valid for that system call, and pointers must stay valid while it runs.
#[inline]
pub(crate) unsafe fn call(number: c_long, args: [usize; 4]) -> Result<usize, i32> {
    let result: isize;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the x86-64 system call convention, in which the kernel clobbers rcx and r11. The caller guarantees valid
    // arguments.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") number as isize => result,
            in("rdi") args[0], in("rsi") args[1], in("rdx") args[2], in("r10") args[3],
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: the aarch64 system call convention. The caller guarantees valid arguments.
    unsafe {
        std::arch::asm!("svc 0", in("x8") number, inlateout("x0") args[0] as isize => result,
            in("x1") args[1], in("x2") args[2], in("x3") args[3], options(nostack));
    }
    #[cfg(target_arch = "riscv64")]
    // SAFETY: the RISC-V system call convention. The caller guarantees valid arguments.
    unsafe {
        std::arch::asm!("ecall", in("a7") number, inlateout("a0") args[0] as isize => result,
            in("a1") args[1], in("a2") args[2], in("a3") args[3], options(nostack));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64")))]
    // SAFETY: the caller guarantees valid arguments. This writes errno if the call fails. A forked child has its own
    // errno, and what a signal handler writes to, an eventfd, does not fail.
    unsafe {
        result = match libc::syscall(number, args[0], args[1], args[2], args[3]) {
            -1 => -(*libc::__errno_location() as isize),
            result => result as isize,
        };
    }
    // The kernel reserves the highest 4095 values for errors.
    if (-4095..0).contains(&result) {
        Err(-result as i32)
    } else {
        Ok(result as usize)
    }
}

/// # Safety
///
/// `bytes` points to `length` bytes.
pub(crate) unsafe fn write(fd: c_int, bytes: *const u8, length: usize) -> Result<usize, i32> {
    // SAFETY: as for this function (write(2)).
    unsafe { call(libc::SYS_write, [fd as usize, bytes as usize, length, 0]) }
}

pub(crate) fn chdir(path: &CStr) -> Result<(), i32> {
    // SAFETY: a C string (chdir(2)).
    unsafe { call(libc::SYS_chdir, [path.as_ptr() as usize, 0, 0, 0]).map(drop) }
}

/// Returns only on an error.
///
/// # Safety
///
/// Both arrays end with a null pointer, and their other elements are C strings.
pub(crate) unsafe fn execve(program: &CStr, argv: *const *const c_char, envp: *const *const c_char) -> i32 {
    // SAFETY: as for this function (execve(2)).
    let result = unsafe { call(libc::SYS_execve, [program.as_ptr() as usize, argv as usize, envp as usize, 0]) };
    result.err().unwrap_or_default()
}

pub(crate) fn exit(status: c_int) -> ! {
    loop {
        // SAFETY: a plain number (exit_group(2)).
        let _ = unsafe { call(libc::SYS_exit_group, [status as usize, 0, 0, 0]) };
    }
}

/// Blocks for this many milliseconds, which must be fewer than a thousand.
pub(crate) fn pause(milliseconds: c_long) {
    // The kernel's timespec for this call has two longs on every architecture (nanosleep(2)).
    let time: [c_long; 2] = [0, milliseconds * 1_000_000];
    // SAFETY: `time` is alive during the call.
    let _ = unsafe { call(libc::SYS_nanosleep, [time.as_ptr() as usize, 0, 0, 0]) };
}

/// Sets the descriptor flags of `fd`: FD_CLOEXEC or 0.
///
/// # Safety
///
/// The caller owns the descriptor table.
pub(crate) unsafe fn set_fd_flags(fd: usize, flags: c_int) -> Result<(), i32> {
    // SAFETY: plain numbers (fcntl(2)).
    unsafe { call(libc::SYS_fcntl, [fd, libc::F_SETFD as usize, flags as usize, 0]).map(drop) }
}
