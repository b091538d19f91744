//! CPU affinity and nice value, which Linux keeps per thread, and which a new process inherits from the thread that
//! creates it.

use rustix::process::getpriority_process;

use super::calls::call;

/// The number of bytes for the CPUs of the largest machine that a kernel supports.
const MOST: usize = 1024;

/// The CPUs that a thread may use (one bit each, in the kernel's form), and its nice value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Scheduling {
    cpus: Option<Vec<u8>>,
    nice: Option<i32>,
}

impl Scheduling {
    pub(crate) fn of_this_thread() -> Self {
        let mut cpus = vec![0; MOST];
        // SAFETY: the kernel writes at most the buffer's length into it (sched_getaffinity(2)).
        let filled = unsafe { call(libc::SYS_sched_getaffinity, [0, cpus.len(), cpus.as_mut_ptr() as usize, 0]) };
        let cpus = filled.ok().map(|filled| {
            cpus.truncate(filled);
            cpus
        });
        Self { cpus, nice: getpriority_process(None).ok() }
    }

    /// Returns the values that a child of the calling thread must set to start with these values.
    pub(crate) fn to_restore(&self) -> Self {
        let now = Self::of_this_thread();
        let cpus = self.cpus.clone().filter(|_| !now.may_use_all_of(self));
        Self { cpus, nice: self.nice.filter(|_| now.nice != self.nice) }
    }

    /// A service manager may give a running service more CPUs (`AllowedCPUs=`). A thread that has all the CPUs of the
    /// start, or more, was not pinned. Setting the old CPUs would keep every later generation off the new ones.
    fn may_use_all_of(&self, start: &Self) -> bool {
        match (&self.cpus, &start.cpus) {
            (Some(now), Some(start)) => {
                now.len() >= start.len() && start.iter().zip(now).all(|(start, now)| start & !now == 0)
            }
            _ => true,
        }
    }

    /// Sets the values for this process. Runs in the child of a spawn, so it does not allocate or use errno. Failures
    /// are ignored, because the CPUs may be gone, and a lower nice value needs permission (RLIMIT_NICE, CAP_SYS_NICE).
    pub(crate) fn apply(&self) {
        // SAFETY: the buffer has the given length (sched_setaffinity(2)), and the rest are plain numbers
        // (setpriority(2)).
        unsafe {
            if let Some(cpus) = &self.cpus {
                let _ = call(libc::SYS_sched_setaffinity, [0, cpus.len(), cpus.as_ptr() as usize, 0]);
            }
            if let Some(nice) = self.nice {
                let _ = call(libc::SYS_setpriority, [libc::PRIO_PROCESS as usize, 0, nice as usize, 0]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_cpus_are_kept_and_fewer_are_not() {
        let with = |cpus: &[u8]| Scheduling { cpus: Some(cpus.to_vec()), nice: Some(0) };
        assert!(with(&[0b0111, 0]).may_use_all_of(&with(&[0b0011, 0])));
        assert!(with(&[0b0011, 0]).may_use_all_of(&with(&[0b0011, 0])));
        assert!(!with(&[0b0001, 0]).may_use_all_of(&with(&[0b0011, 0])));
        assert!(!with(&[0b0110, 0]).may_use_all_of(&with(&[0b0011, 0])));
        assert!(Scheduling { cpus: None, nice: None }.may_use_all_of(&with(&[1])));
        let now = Scheduling::of_this_thread();
        assert!(now.cpus.is_some() && now.nice.is_some());
        assert_eq!(now.to_restore(), Scheduling { cpus: None, nice: None });
    }
}
