//! Several VMs on two hosts, which go on while something is done to one of them, or to an agent.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use belay_e2e::{Bed, Host};
use belay_synthetic::{Guest, Left};
use serde_json::Value;

use crate::{boot_named, offer_named, show_named, socket_named};

/// Requests in flight in each queue.
pub(crate) const DEPTH: usize = 8;
/// A VM that gets nothing done for so long never will.
const PATIENCE: Duration = Duration::from_secs(30);
/// Time between two looks at a state.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    A,
    B,
}

impl Side {
    pub(crate) fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }
}

/// A VM with one disk.
pub(crate) struct Vm {
    /// Its disk's name.
    pub(crate) name: String,
    pub(crate) guest: Guest,
    /// Where its VMM runs.
    pub(crate) at: Side,
    /// What it has left at the other host, while it moves.
    pub(crate) left: Option<Left>,
    /// The agent has died: connect as soon as it is back.
    reconnect: bool,
    /// Where its image was when that was last looked at, and on which host.
    pub(crate) image: PathBuf,
    pub(crate) backing: Side,
    progress: (u64, Instant),
    /// It begins nothing more.
    pub(crate) resting: bool,
}

/// The hosts and the VMs.
pub(crate) struct Fleet<'a> {
    pub(crate) bed: &'a mut Bed,
    pub(crate) vms: Vec<Vm>,
}

impl<'a> Fleet<'a> {
    pub(crate) fn new(bed: &'a mut Bed) -> Self {
        Self { bed, vms: Vec::new() }
    }

    pub(crate) fn host(&self, side: Side) -> &Host {
        match side {
            Side::A => &self.bed.a,
            Side::B => &self.bed.b,
        }
    }

    pub(crate) fn host_mut(&mut self, side: Side) -> &mut Host {
        match side {
            Side::A => &mut self.bed.a,
            Side::B => &mut self.bed.b,
        }
    }

    /// One more VM, on `side`.
    pub(crate) fn boot(&mut self, side: Side, queues: u16, delay_us: u64, seed: u64) -> Result<usize> {
        let name = format!("disk{}", self.vms.len());
        let guest = boot_named(self.host(side), &name, queues, delay_us, seed)?;
        let image = self.host(side).folder.join(format!("{name}.img"));
        let progress = (0, Instant::now());
        self.vms.push(Vm {
            name,
            guest,
            at: side,
            left: None,
            reconnect: false,
            image,
            backing: side,
            progress,
            resting: false,
        });
        Ok(self.vms.len() - 1)
    }

    /// The device of a VM, as a host sees it.
    pub(crate) fn show(&self, side: Side, vm: usize) -> Result<Value> {
        show_named(self.host(side), &self.vms[vm].name)
    }

    pub(crate) fn socket(&self, side: Side, vm: usize) -> PathBuf {
        socket_named(self.host(side), &self.vms[vm].name)
    }

    /// Lets every VM go on a little. Those whose agent is back connect to it.
    pub(crate) fn step(&mut self) {
        for index in 0..self.vms.len() {
            if self.vms[index].reconnect {
                let socket = self.socket(self.vms[index].at, index);
                let vm = &mut self.vms[index];
                if !vm.guest.try_connect(&socket) {
                    continue;
                }
                vm.guest.start();
                vm.reconnect = false;
            }
            let vm = &mut self.vms[index];
            if vm.resting {
                vm.guest.reap();
            } else {
                vm.guest.step(DEPTH);
            }
        }
    }

    /// As [`Fleet::step`]; fails if a VM has been stuck for too long.
    fn step_checked(&mut self) -> Result<()> {
        self.step();
        for vm in self.vms.iter_mut().filter(|vm| !vm.resting) {
            if vm.guest.completed != vm.progress.0 {
                vm.progress = (vm.guest.completed, Instant::now());
            } else if vm.progress.1.elapsed() > PATIENCE {
                bail!("the VM of {} at {:?} is stuck with {}", vm.name, vm.at, vm.guest.stuck());
            }
        }
        Ok(())
    }

    fn patience(&mut self) {
        self.vms.iter_mut().for_each(|vm| vm.progress.1 = Instant::now());
    }

    /// Lets every VM complete so many more requests.
    pub(crate) fn run(&mut self, requests: u64) -> Result<()> {
        self.patience();
        let goals: Vec<u64> = self.vms.iter().map(|vm| vm.guest.completed + requests).collect();
        while self.vms.iter().zip(&goals).any(|(vm, goal)| !vm.resting && vm.guest.completed < *goal) {
            self.step_checked()?;
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Lets the VMs go on for some rounds, whether or not they get anything done.
    pub(crate) fn linger(&mut self, rounds: u64) {
        for _ in 0..rounds {
            self.step();
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Lets the VMs go on until there is something to see, for at most `limit`.
    pub(crate) fn wait_within<T>(
        &mut self,
        limit: Duration,
        mut look: impl FnMut(&Self) -> Result<Option<T>>,
    ) -> Result<Option<T>> {
        let deadline = Instant::now() + limit;
        let mut looked = None;
        loop {
            self.step();
            if looked.is_none_or(|at: Instant| at.elapsed() > LOOK_EVERY) {
                if let Some(seen) = look(self)? {
                    return Ok(Some(seen));
                }
                looked = Some(Instant::now());
            }
            if Instant::now() > deadline {
                return Ok(None);
            }
            std::thread::yield_now();
        }
    }

    /// Lets the VMs go on until there is something to see.
    pub(crate) fn wait<T>(&mut self, what: &str, look: impl FnMut(&Self) -> Result<Option<T>>) -> Result<T> {
        match self.wait_within(belay_e2e::LIMIT, look)? {
            Some(seen) => Ok(seen),
            None => bail!("waited in vain: {what}"),
        }
    }

    /// Does something that takes its time, while the VMs go on.
    pub(crate) fn meanwhile<T: Send + 'static>(
        &mut self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let worker = std::thread::spawn(work);
        while !worker.is_finished() {
            self.step();
            std::thread::yield_now();
        }
        worker.join().map_err(|_| anyhow::anyhow!("the work panicked"))?
    }

    /// Kills an agent, and starts another one. VMs connect again when they can.
    pub(crate) fn restart(&mut self, side: Side, rounds_down: u64) -> Result<()> {
        self.host_mut(side).kill_agent()?;
        for vm in &mut self.vms {
            if vm.at == side && vm.guest.is_connected() {
                vm.guest.lose_connection();
                vm.reconnect = true;
            } else if vm.at != side
                && let Some(left) = &mut vm.left
            {
                left.lose_connection();
            }
        }
        self.linger(rounds_down);
        self.host_mut(side).start_agent()
    }

    /// Waits until a VM is connected.
    pub(crate) fn connected(&mut self, vm: usize) -> Result<()> {
        self.wait("a VM that can connect again", |fleet| Ok((!fleet.vms[vm].reconnect).then_some(())))
    }

    /// Stops a VM's rings with requests in flight.
    pub(crate) fn stop(&mut self, vm: usize) -> Result<()> {
        self.connected(vm)?;
        let guest = &mut self.vms[vm].guest;
        guest.fill(DEPTH);
        guest.stop();
        Ok(())
    }

    /// A stopped VM leaves its host; its VMM stays there for now. Nothing runs until [`Fleet::arrive`] or
    /// [`Fleet::go_back`].
    pub(crate) fn leave(&mut self, vm: usize) {
        let vm = &mut self.vms[vm];
        vm.left = Some(vm.guest.leave());
        vm.at = vm.at.other();
    }

    /// The VM that has left starts where it went to.
    pub(crate) fn arrive(&mut self, vm: usize) -> Result<()> {
        let socket = self.socket(self.vms[vm].at, vm);
        self.wait("a device to connect to", |_| Ok(socket.exists().then_some(())))?;
        let guest = &mut self.vms[vm].guest;
        guest.connect(&socket);
        guest.fresh_inflight_region();
        guest.start();
        Ok(())
    }

    /// The VM that has left goes on where it was.
    pub(crate) fn go_back(&mut self, vm: usize) {
        let vm = &mut self.vms[vm];
        let Some(left) = vm.left.take() else { return };
        drop(vm.guest.leave());
        vm.at = vm.at.other();
        vm.reconnect = !vm.guest.go_back(left);
    }

    /// Offers a VM's disk to the other host.
    pub(crate) fn offer(&mut self, vm: usize, mode: &'static str) -> Result<()> {
        let from = self.vms[vm].at;
        let (folder, name) = (self.host(from).folder.clone(), self.vms[vm].name.clone());
        let to = self.host(from.other()).name;
        self.meanwhile(move || {
            belay_e2e::until("an offer", || match offer_named(&folder, &name, to, mode) {
                // The ledger is a moment behind the handover or the exchange before.
                Err(error) if error.to_string().contains("is still at") => Ok(None),
                // The VMM that the VM has left there has only just closed its connection.
                Err(error) if error.to_string().contains("has a device") => Ok(None),
                // It is being cut over.
                Err(error) if error.to_string().contains("is being copied") => Ok(None),
                Err(error) if error.to_string().contains("cannot move now") => Ok(None),
                outcome => outcome.map(Some),
            })
            .map(drop)
        })
    }

    /// Waits until the device of a VM is at a host, in the epoch after this one.
    pub(crate) fn moved(&mut self, vm: usize, to: Side, epoch: u64) -> Result<()> {
        self.wait("the handover", |fleet| {
            let there = fleet.show(to, vm).ok();
            Ok(there.filter(|device| device["epoch"] == epoch + 1).map(drop))
        })
    }

    pub(crate) fn epoch(&self, vm: usize) -> Result<u64> {
        self.show(self.vms[vm].at, vm)?["epoch"].as_u64().context("no epoch")
    }

    /// Moves a VM, as simply as can be.
    pub(crate) fn hand_over(&mut self, vm: usize, mode: &'static str) -> Result<()> {
        let epoch = self.epoch(vm)?;
        self.offer(vm, mode)?;
        self.stop(vm)?;
        self.leave(vm);
        self.arrive(vm)?;
        self.moved(vm, self.vms[vm].at, epoch)?;
        self.forget_left(vm);
        Ok(())
    }

    /// What the VM has left is gone.
    pub(crate) fn forget_left(&mut self, vm: usize) {
        self.vms[vm].left = None;
    }

    /// Checks everything that every VM has written.
    pub(crate) fn verify(&mut self) -> Result<()> {
        for index in 0..self.vms.len() {
            self.connected(index)?;
            self.vms[index].guest.verify();
        }
        Ok(())
    }
}
