//! VMs that move, come back, pause, are reset and have their disks copied, in random order, while agents die at random
//! moments. Every block is checked against what was written; both images after each exchange.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use belay_synthetic::Random;
use serde_json::Value;

use crate::fleet::{Fleet, Side};
use crate::{bring_named, call, with_bed};

/// `BELAY_SEED` draws other schedules, `BELAY_SECONDS` goes on for longer.
const SEED: u64 = 1;
const SECONDS: u64 = 16;
/// How long a handover may take to be decided after a restart, before it is taken back.
const DECIDED_WITHIN: Duration = Duration::from_millis(300);

pub(crate) fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

struct Run<'a> {
    fleet: Fleet<'a>,
    random: Random,
    restarts: bool,
    began: Instant,
    /// What was done, for whoever wonders how it came to this.
    log: Vec<String>,
    /// Disks that follow their VM by themselves.
    follows: Vec<bool>,
    moves: u32,
    exchanges: u32,
    killed: u32,
}

impl Run<'_> {
    fn below(&mut self, limit: u64) -> u64 {
        self.random.below(limit)
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }

    fn note(&mut self, text: String) {
        self.log.push(format!("{:7.3} {text}", self.began.elapsed().as_secs_f64()));
    }

    fn show(&self, side: Side, vm: usize) -> Result<Value> {
        self.fleet.show(side, vm)
    }

    /// Whether guest and disk are at the same host; then it is known where the image is.
    fn is_local(&mut self, vm: usize) -> Result<bool> {
        let at = self.fleet.vms[vm].at;
        let device = self.show(at, vm)?;
        let local = device["attached_to"] == device["backed_by"];
        if local && self.fleet.vms[vm].backing != at {
            let name = &self.fleet.vms[vm].name;
            self.fleet.vms[vm].image = self.fleet.host(at).images.join(format!("{name}.img"));
            self.fleet.vms[vm].backing = at;
        }
        Ok(local)
    }

    /// Perhaps kills an agent, here and now. Whether that of `from` was killed.
    fn perhaps_kill(&mut self, at: &str, from: Side) -> Result<bool> {
        if !self.restarts || !self.chance(7) {
            return Ok(false);
        }
        let side = if self.chance(2) { Side::A } else { Side::B };
        let rounds = self.below(30);
        self.note(format!("  kill {side:?} ({at})"));
        self.killed += 1;
        self.fleet.restart(side, rounds)?;
        self.note("  back".into());
        Ok(side == from)
    }

    /// Takes an offer back. `false`: too late.
    fn withdraw(&mut self, vm: usize, from: Side) -> Result<bool> {
        let (folder, name) = (self.fleet.host(from).folder.clone(), self.fleet.vms[vm].name.clone());
        self.fleet.meanwhile(move || {
            match call(&folder, "DELETE", &format!("/v1/devices/{name}/offer"), None) {
                Ok(_) => Ok(true),
                Err(error) if error.to_string().contains("too late") => Ok(false),
                Err(error) => Err(error),
            }
        })
    }

    fn migrate(&mut self, vm: usize) -> Result<()> {
        let from = self.fleet.vms[vm].at;
        let to = from.other();
        let follow = self.is_local(vm)? && self.chance(2);
        let mode = if follow { "follow" } else { "stay" };
        let epoch = self.fleet.epoch(vm)?;
        self.note(format!("move {vm} from {from:?}, {mode}, epoch {epoch}"));
        self.fleet.offer(vm, mode)?;
        // Its disk may have arrived just before.
        self.is_local(vm)?;
        self.perhaps_kill("offered", from)?;
        let some = self.below(60);
        self.fleet.run(some)?;
        if self.chance(8) {
            self.note("  withdrawn before the stop".into());
            ensure!(self.withdraw(vm, from)?, "nothing was claimed");
            return Ok(());
        }
        self.fleet.stop(vm)?;
        while self.chance(5) {
            self.note("  resumed".into());
            self.fleet.vms[vm].guest.start();
            let some = self.below(40);
            self.fleet.run(some)?;
            self.fleet.stop(vm)?;
        }
        self.fleet.leave(vm);
        let parked = self.perhaps_kill("parked", from)?;
        if self.chance(8) {
            self.note("  back before the start".into());
            let first = self.chance(2);
            ensure!(!first || self.withdraw(vm, from)?, "nothing was claimed");
            self.fleet.go_back(vm);
            self.fleet.run(20)?;
            self.fleet.connected(vm)?;
            ensure!(first || self.withdraw(vm, from)?, "nothing was claimed");
            return Ok(());
        }
        self.fleet.arrive(vm)?;
        if self.chance(2) {
            let rounds = self.below(12);
            self.fleet.linger(rounds);
        }
        let started = self.perhaps_kill("started", from)?;
        let moved = |fleet: &Fleet| {
            let there = fleet.show(to, vm).ok();
            Ok(there.filter(|device| device["epoch"] == epoch + 1).map(drop))
        };
        if (parked || started)
            && self.fleet.wait_within(DECIDED_WITHIN, moved)?.is_none()
            && self.withdraw(vm, from)?
        {
            // What the killed agent knew of the requests in flight is lost: the VM has to go back.
            self.note("  not granted: back".into());
            self.fleet.go_back(vm);
            return self.fleet.run(20);
        }
        self.fleet.wait("the handover", moved)?;
        self.fleet.forget_left(vm);
        self.follows[vm] = follow;
        self.moves += 1;
        Ok(())
    }

    /// Brings the disk of a VM to it, if it is elsewhere.
    fn bring(&mut self, vm: usize) -> Result<()> {
        if self.is_local(vm)? {
            return Ok(());
        }
        let at = self.fleet.vms[vm].at;
        let (folder, name) = (self.fleet.host(at).folder.clone(), self.fleet.vms[vm].name.clone());
        if !self.follows[vm] {
            let bandwidth = self.chance(2).then_some(8 << 20);
            self.note(format!("bring {vm} to {at:?}, bandwidth {bandwidth:?}"));
            let (to, of) = (folder.clone(), name.clone());
            self.fleet.meanwhile(move || bring_named(&to, &of, bandwidth))?;
            if self.chance(5) {
                self.note("  cancelled".into());
                let some = self.below(40);
                self.fleet.run(some)?;
                let path = format!("/v1/devices/{name}/exchange");
                let cancelled = self.fleet.meanwhile(move || Ok(call(&folder, "DELETE", &path, None)))?;
                match cancelled {
                    Ok(_) => return self.fleet.run(40),
                    Err(error) => self.note(format!("  {error}")),
                }
            }
        } else {
            self.note(format!("await {vm} at {at:?}"));
        }
        while self.chance(2) {
            let some = self.below(100);
            self.fleet.run(some)?;
            self.perhaps_kill("copying", at)?;
        }
        let quiet = self.chance(2);
        self.fleet.connected(vm)?;
        if quiet {
            self.quiesce(vm)?;
        }
        // Only if nothing has been written since the cut.
        let equal = quiet && !self.is_local(vm)?;
        let local = |fleet: &Fleet| {
            let device = fleet.show(at, vm)?;
            Ok((device["state"] == "local" && device["exchange"].is_null()).then_some(()))
        };
        let arrived = self.fleet.wait("the disk where its VM is", local);
        arrived
            .with_context(|| format!("{:?}", self.show(at, vm).ok().map(|device| device["state"].clone())))?;
        self.exchanges += 1;
        self.follows[vm] = false;
        let old = self.fleet.vms[vm].image.clone();
        ensure!(self.is_local(vm)?);
        let image = self.fleet.vms[vm].image.clone();
        if quiet {
            self.fleet.connected(vm)?;
            let guest = &mut self.fleet.vms[vm].guest;
            guest.check_image(&std::fs::read(&image)?);
            if equal {
                guest.check_image(&std::fs::read(&old)?);
            }
            self.fleet.vms[vm].resting = false;
        }
        Ok(())
    }

    /// Lets a VM end what it has in flight, and begin nothing more.
    fn quiesce(&mut self, vm: usize) -> Result<()> {
        self.fleet.vms[vm].resting = true;
        self.fleet.wait("nothing in flight", |fleet| Ok((fleet.vms[vm].guest.in_flight() == 0).then_some(())))
    }

    fn act(&mut self) -> Result<()> {
        let vm = self.below(self.fleet.vms.len() as u64) as usize;
        self.fleet.connected(vm)?;
        match self.below(12) {
            0..=4 => self.migrate(vm),
            5..=7 => self.bring(vm),
            8 => {
                self.note(format!("pause {vm}"));
                self.fleet.stop(vm)?;
                let rounds = self.below(20);
                self.fleet.linger(rounds);
                self.fleet.vms[vm].guest.start();
                Ok(())
            }
            9 => {
                self.note(format!("reset {vm}"));
                self.fleet.stop(vm)?;
                let guest = &mut self.fleet.vms[vm].guest;
                guest.reset();
                guest.fresh_inflight_region();
                guest.start();
                Ok(())
            }
            10 => {
                let from = self.fleet.vms[vm].at;
                if self.restarts && self.chance(3) {
                    self.note(format!("freeze {from:?}"));
                    let rounds = self.below(100);
                    self.fleet.host(from).freeze_agent()?;
                    self.fleet.linger(rounds);
                    return self.fleet.host(from).thaw_agent();
                }
                self.perhaps_kill("between", from).map(drop)
            }
            _ => {
                let some = self.below(200);
                self.fleet.run(some)
            }
        }
    }

    fn all(&mut self, seconds: u64) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(seconds);
        // On a busy machine it takes longer until there was something of each.
        while Instant::now() < end || self.moves == 0 || self.exchanges == 0 {
            self.act()?;
            self.fleet.run(10)?;
        }
        self.fleet.verify()
    }
}

fn schedule(restarts: bool, seconds: u64) {
    let seed = number("BELAY_SEED", SEED);
    with_bed(|bed| {
        println!("BELAY_SEED={seed} draws this schedule again");
        let mut fleet = Fleet::new(bed);
        fleet.boot(Side::A, 4, 300, seed)?;
        fleet.boot(Side::A, 1, 0, seed + 1)?;
        fleet.boot(Side::B, 2, 1000, seed + 2)?;
        let follows = vec![false; fleet.vms.len()];
        let random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let (began, log) = (Instant::now(), Vec::new());
        let mut run = Run { fleet, random, restarts, began, log, follows, moves: 0, exchanges: 0, killed: 0 };
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run.all(seconds)));
        println!(
            "{} handovers, {} exchanges, {} agents killed, {} requests",
            run.moves,
            run.exchanges,
            run.killed,
            run.fleet.vms.iter().map(|vm| vm.guest.completed).sum::<u64>()
        );
        match outcome {
            Ok(Ok(())) => {}
            Ok(Err(error)) => bail!("seed {seed}: {error:#}\n{}", run.log.join("\n")),
            Err(_) => bail!("seed {seed}: the VM is not content\n{}", run.log.join("\n")),
        }
        Ok(())
    });
}

#[test]
fn vms_that_move_in_random_order_lose_and_double_nothing() {
    schedule(false, number("BELAY_SECONDS", SECONDS / 2));
}

#[test]
fn agents_that_die_at_random_moments_lose_and_double_nothing() {
    schedule(true, number("BELAY_SECONDS", SECONDS));
}
