//! Links that are cut, fall silent, hear in one direction only or become slow, while guests use disks of the other host,
//! move and take their disks along: nothing fails, everything ends exactly once.

use std::time::Duration;

use anyhow::Result;
use belay_e2e::Bed;
use belay_synthetic::Random;

use crate::fleet::{Fleet, Side};
use crate::proxy::{Proxy, Way};
use crate::random::number;
use crate::{bring_named, with_bed};

/// `BELAY_SEED` draws other moments.
const SEED: u64 = 1;

/// What happens to a network.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// Every connection ends; new ones are welcome.
    Dropped,
    /// Every connection ends, and new ones at once.
    Cut,
    /// Nothing arrives, nothing ends.
    Silent,
    /// One way only.
    HalfOpen(Way),
    Slow,
}

const FAULTS: [Fault; 6] = [
    Fault::Dropped,
    Fault::Cut,
    Fault::Silent,
    Fault::HalfOpen(Way::There),
    Fault::HalfOpen(Way::Back),
    Fault::Slow,
];

impl Fault {
    /// Whether nothing gets through until it is over.
    fn is_noticed(self) -> bool {
        matches!(self, Self::Cut | Self::Silent | Self::HalfOpen(_))
    }
}

/// Both directions of the network between the hosts.
struct Network {
    to_a: Proxy,
    to_b: Proxy,
}

impl Network {
    /// Puts itself between two hosts. A peer that is silent for 400 ms counts as dead.
    fn between(bed: &mut Bed) -> Result<Self> {
        let network = Self { to_a: Proxy::start(bed.a.address())?, to_b: Proxy::start(bed.b.address())? };
        for (host, peer, proxy) in
            [(&mut bed.a, "host-b", &network.to_b), (&mut bed.b, "host-a", &network.to_a)]
        {
            host.kill_agent()?;
            host.configure(&format!(
                "[link]\nheartbeat_ms = 100\ndead_after_ms = 400\n[peers]\n{peer} = [\"{}\"]\n",
                proxy.address
            ))?;
            host.start_agent()?;
        }
        Ok(network)
    }

    fn both(&self) -> [&Proxy; 2] {
        [&self.to_a, &self.to_b]
    }

    fn heal(&self) {
        self.both().iter().for_each(|proxy| proxy.heal());
    }
}

struct Run<'a> {
    fleet: Fleet<'a>,
    network: Network,
    random: Random,
}

impl Run<'_> {
    fn linger(&mut self, most: u64) {
        let rounds = self.random.below(most);
        self.fleet.linger(rounds);
    }

    fn begin(&mut self, fault: Fault) {
        let delay = Duration::from_micros(200 + self.random.below(20_000));
        for proxy in self.network.both() {
            match fault {
                Fault::Dropped => proxy.drop_all(),
                Fault::Cut => proxy.cut(),
                Fault::Silent => [Way::There, Way::Back].into_iter().for_each(|way| proxy.freeze(way)),
                Fault::HalfOpen(way) => proxy.freeze(way),
                Fault::Slow => proxy.delay(delay),
            }
        }
    }

    /// A fault begins; the hosts of the guests notice it, as far as it can be noticed; it ends.
    fn suffer(&mut self, fault: Fault) -> Result<()> {
        self.begin(fault);
        if fault.is_noticed() {
            self.fleet.wait("guests' hosts that know of it", |fleet| {
                let mut all = (0..fleet.vms.len()).map(|vm| fleet.show(fleet.vms[vm].at, vm));
                Ok(all.all(|device| device.is_ok_and(|device| device["link_up"] != true)).then_some(()))
            })?;
        }
        self.linger(100);
        self.network.heal();
        Ok(())
    }

    /// Moves a VM; the network has a fault while it starts at its new host. It waits, that is all.
    fn migrate(&mut self, vm: usize, mode: &'static str, fault: Fault) -> Result<()> {
        let to = self.fleet.vms[vm].at.other();
        let epoch = self.fleet.epoch(vm)?;
        self.fleet.offer(vm, mode)?;
        self.fleet.run(30)?;
        let moment = self.random.below(4);
        for step in 0..4 {
            if step == moment {
                self.begin(fault);
            }
            match step {
                0 => self.fleet.stop(vm)?,
                1 => self.fleet.leave(vm),
                2 => self.fleet.arrive(vm)?,
                _ => self.linger(40),
            }
        }
        self.linger(600);
        self.network.heal();
        self.fleet.moved(vm, to, epoch)?;
        self.fleet.forget_left(vm);
        self.fleet.run(30)
    }

    /// The disk of a VM comes to it, through faults.
    fn bring(&mut self, vm: usize) -> Result<()> {
        let at = self.fleet.vms[vm].at;
        let host = self.fleet.host(at).name;
        let (folder, name) = (self.fleet.host(at).folder.clone(), self.fleet.vms[vm].name.clone());
        self.fleet.meanwhile(move || bring_named(&folder, &name, Some(8 << 20)))?;
        for fault in [Fault::Silent, Fault::Cut, Fault::Dropped] {
            self.fleet.run(20)?;
            self.suffer(fault)?;
        }
        self.fleet.wait("the disk where its VM is", |fleet| {
            Ok((fleet.show(at, vm)?["backed_by"] == host).then_some(()))
        })
    }
}

fn with_network(test: impl FnOnce(&mut Run) -> Result<()>) {
    let seed = number("BELAY_SEED", SEED);
    with_bed(|bed| {
        println!("BELAY_SEED={seed} draws these moments again");
        let network = Network::between(bed)?;
        let mut fleet = Fleet::new(bed);
        fleet.boot(Side::A, 4, 300, seed)?;
        fleet.boot(Side::B, 2, 0, seed + 1)?;
        let random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1);
        let mut run = Run { fleet, network, random };
        test(&mut run)?;
        run.fleet.verify()
    });
}

#[test]
fn requests_at_another_host_outlive_every_link() {
    with_network(|run| {
        for vm in [0, 1] {
            run.migrate(vm, "stay", Fault::Slow)?;
        }
        for fault in FAULTS.into_iter().cycle().take(2 * FAULTS.len()) {
            run.suffer(fault)?;
            let some = run.random.below(200);
            run.fleet.run(some)?;
        }
        Ok(())
    });
}

#[test]
fn vms_and_disks_move_through_faults_of_the_link() {
    with_network(|run| {
        let mut faults = FAULTS.into_iter().cycle();
        for round in 0..4 {
            for vm in [0, 1] {
                let fault = faults.next().unwrap_or(Fault::Cut);
                run.migrate(vm, "stay", fault)?;
                if round % 2 == 0 {
                    run.bring(vm)?;
                }
            }
        }
        Ok(())
    });
}
