//! Futures that end with the shutdown handle.

use std::future::{poll_fn, Future};
use std::pin::pin;
use std::task::Poll;

use super::gate::{StopOnShutdown, TaskGate};
use crate::shutdown::{Phase, Shutdown};

/// A value whose long operations end when accepting is over, such as a UDP socket.
#[derive(Debug)]
pub struct Stoppable<S> {
    inner: S,
    shutdown: Shutdown,
    stop_on_shutdown: StopOnShutdown,
}

impl<S> Stoppable<S> {
    pub(super) fn new(inner: S, shutdown: Shutdown, stop_on_shutdown: StopOnShutdown) -> Self {
        Self { inner, shutdown, stop_on_shutdown }
    }

    /// Returns the value. Direct calls on it continue in every state.
    pub fn as_unstoppable_ref(&self) -> &S {
        &self.inner
    }

    /// Like [`as_unstoppable_ref`](Self::as_unstoppable_ref), but mutable.
    pub fn as_unstoppable_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// Returns the value.
    pub fn into_inner(self) -> S {
        self.inner
    }

    /// Runs a future on the value, or returns `None` when accepting is over. The future begins after `ready`, is not polled
    /// while a new generation is on probation, and is dropped when accepting is over, so it must be cancel-safe.
    pub async fn until_stopped<'a, O, F>(&'a self, f: impl FnOnce(&'a S) -> F) -> Option<O>
    where
        F: Future<Output = O>,
    {
        let mut gate = self.open().await?;
        until_stopped(&mut gate, f(&self.inner)).await
    }

    /// Like [`until_stopped`](Self::until_stopped), with mutable access.
    pub async fn until_stopped_mut<'a, O, F>(&'a mut self, f: impl FnOnce(&'a mut S) -> F) -> Option<O>
    where
        F: Future<Output = O>,
    {
        let mut gate = self.open().await?;
        until_stopped(&mut gate, f(&mut self.inner)).await
    }

    async fn open(&self) -> Option<TaskGate> {
        let mut gate = TaskGate::new(self.shutdown.clone(), self.stop_on_shutdown);
        let opened = poll_fn(|cx| match gate.watch(cx) {
            Phase::Wait => Poll::Pending,
            Phase::End => Poll::Ready(false),
            Phase::Accept | Phase::AcceptQueued => Poll::Ready(true),
        });
        opened.await.then_some(gate)
    }
}

async fn until_stopped<O>(gate: &mut TaskGate, future: impl Future<Output = O>) -> Option<O> {
    let mut future = pin!(future);
    poll_fn(|cx| match gate.watch(cx) {
        Phase::Wait => Poll::Pending,
        Phase::End => Poll::Ready(None),
        Phase::Accept => future.as_mut().poll(cx).map(Some),
        Phase::AcceptQueued => {
            gate.count_queued();
            match future.as_mut().poll(cx) {
                Poll::Ready(output) => Poll::Ready(Some(output)),
                Poll::Pending => Poll::Ready(None),
            }
        }
    })
    .await
}
