//! Two hosts, a link, a VM; see `schedules.rs`.

mod borrowing;
mod lending;

use std::collections::VecDeque;

use belay_handover::handover::{Borrower, Destination, RingStart, Source};
use belay_wire::{
    Epoch, HeadIndex, InflightList, ListedRequest, QueueBase, QueueIndex, Refusal, RequestKind, RequestState,
    TxId,
};

pub(crate) const QUEUES: usize = 2;
const SIZE: u16 = 8;

/// A host. A has the backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum At {
    A,
    B,
}

/// A ring in a VM's memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ring {
    /// What has been taken from it.
    pub(crate) base: u16,
    pub(crate) used: u16,
    /// In flight, by number.
    pub(crate) heads: Vec<(u16, u64)>,
}

impl Ring {
    fn listed(&self, queue: usize) -> Vec<ListedRequest> {
        let request = |(head, txid): &(u16, u64)| ListedRequest {
            queue: QueueIndex(queue as u16),
            head: HeadIndex(*head),
            kind: RequestKind::Write,
            state: RequestState::Sent,
            txid: TxId(*txid),
            offset: 0,
            len: 512,
        };
        self.heads.iter().map(request).collect()
    }
}

/// A VM and its VMM at one host: there is one that runs, and perhaps one that was left behind or has not begun.
#[derive(Clone, Debug, Default)]
pub(crate) struct Vm {
    pub(crate) rings: [Ring; QUEUES],
    /// Where the VMM starts each ring.
    pub(crate) start_at: [u16; QUEUES],
    pub(crate) started: [bool; QUEUES],
    /// How many of the last requests were taken behind a claim that has not been granted: nobody has executed them.
    pub(crate) behind_claim: [usize; QUEUES],
    /// What the in-flight region says.
    pub(crate) marked: [Vec<(u16, u64)>; QUEUES],
}

impl Vm {
    /// Its rings have been used. (Left open: the agent that knows them dies while the VM is stopped, and the ring that
    /// starts first at the other host was never used.)
    fn booted() -> Self {
        let ring = Ring { base: 1, used: 1, heads: Vec::new() };
        Self { rings: [ring.clone(), ring], start_at: [1; QUEUES], ..Self::default() }
    }
}

/// A ring that its VMM has started: how, and what the region said of requests in flight.
type Waiting = (RingStart, Vec<(u16, u64)>);

/// What a host's process knows of its rings.
#[derive(Clone, Debug, Default)]
pub(crate) struct Port {
    pub(crate) runs: [bool; QUEUES],
    pub(crate) stopped_at: [Option<u16>; QUEUES],
    /// Started by the VMM, not let go yet.
    pub(crate) waiting: [Option<Waiting>; QUEUES],
    /// Stopped before it ran in this process, with these in flight, by the region.
    pub(crate) unknown: [Vec<(u16, u64)>; QUEUES],
    /// Requests of rings that ran in this process are known to it.
    pub(crate) knows: [bool; QUEUES],
}

impl Port {
    /// The list that goes out when the last ring has stopped.
    fn list(&self, vm: &Vm) -> InflightList {
        let queues = (0..QUEUES).filter_map(|queue| {
            self.stopped_at[queue].map(|base| QueueBase { queue: QueueIndex(queue as u16), base })
        });
        let known = (0..QUEUES).filter(|queue| self.knows[*queue]);
        let unknown = (0..QUEUES).flat_map(|queue| {
            let heads = self.unknown[queue].clone();
            Ring { heads, ..Ring::default() }.listed(queue)
        });
        InflightList {
            queues: queues.collect(),
            requests: known.flat_map(|queue| vm.rings[queue].listed(queue)).chain(unknown).collect(),
        }
    }

    /// A ring begins to run, with these requests, from there on. It has to be all, and right there.
    fn run(&mut self, vm: &mut Vm, queue: usize, base: u16, requests: &[(u16, u64)], whose: At) {
        let wrong = self.try_run(vm, queue, base, requests).err();
        assert!(wrong.is_none(), "{whose:?}: {}", wrong.unwrap_or_default());
    }

    /// As [`Port::run`]; `Err` says what is wrong, and the ring does not run.
    pub(crate) fn try_run(
        &mut self,
        vm: &mut Vm,
        queue: usize,
        base: u16,
        requests: &[(u16, u64)],
    ) -> Result<(), String> {
        let ring = &mut vm.rings[queue];
        let behind = vm.behind_claim[queue];
        if behind > 0 && requests.len() + behind == ring.heads.len() {
            // An earlier process of B took them, and its claim was lost: they are taken again.
            ring.heads.truncate(requests.len());
            ring.base = ring.base.wrapping_sub(behind as u16);
            vm.behind_claim[queue] = 0;
        }
        if requests != ring.heads || base != ring.base {
            return Err(format!("queue {queue} would go on at {base} with {requests:?}, not as {ring:?}"));
        }
        vm.marked[queue] = ring.heads.clone();
        self.runs[queue] = true;
        self.knows[queue] = true;
        self.waiting[queue] = None;
        self.stopped_at[queue] = None;
        self.unknown[queue].clear();
        Ok(())
    }

    /// A ring that no machine has a say in: parked, found in the region, or with nothing in flight.
    fn start(&mut self, vm: &mut Vm, queue: usize, start: RingStart, marked: &[(u16, u64)], whose: At) {
        let wrong = self.try_start(vm, queue, start, marked).err();
        assert!(wrong.is_none(), "{whose:?}: {}", wrong.unwrap_or_default());
    }

    /// As [`Port::start`], like [`Port::try_run`].
    pub(crate) fn try_start(
        &mut self,
        vm: &mut Vm,
        queue: usize,
        start: RingStart,
        marked: &[(u16, u64)],
    ) -> Result<(), String> {
        if self.knows[queue] && !vm.rings[queue].heads.is_empty() {
            let parked = vm.rings[queue].heads.clone();
            self.try_run(vm, queue, start.base, &parked)
        } else if marked.is_empty() {
            self.try_run(vm, queue, start.base, &[])
        } else {
            self.try_run(vm, queue, start.used.wrapping_add(marked.len() as u16), marked)
        }
    }
}

pub(crate) enum ToB {
    List(InflightList, u64),
    Revoked(u64),
    Grant(Epoch),
    Taken(Epoch),
    /// And the connection is closed.
    Refused(Refusal, Epoch),
}

pub(crate) enum ToA {
    Claim(Epoch, u64),
    List(InflightList, u64),
    Revoke(u64),
}

#[derive(Default)]
pub(crate) struct Link {
    to_a: VecDeque<ToA>,
    to_b: VecDeque<ToB>,
}

/// A's ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ledger {
    Local(Epoch),
    Lent(Epoch),
}

/// B's ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Borrowed {
    Nothing,
    Prepared(Epoch),
    Remote(Epoch),
}

pub(crate) enum Machine {
    Coming(Destination),
    Here(Borrower),
    Gone,
}

impl Machine {
    /// Whether a guest may come to B, or is there.
    pub(crate) fn is_ready(&self) -> bool {
        match self {
            Self::Coming(destination) => destination.name() == "prepared",
            Self::Here(_) => true,
            Self::Gone => false,
        }
    }
}

pub(crate) struct World {
    dice: u64,
    pub(crate) ledger: Ledger,
    /// A's ledger says that B may take it.
    pub(crate) offered: bool,
    /// A write of A's ledger that is under way.
    pub(crate) writing: Option<Ledger>,
    pub(crate) borrowed: Borrowed,
    pub(crate) recording: Option<Borrowed>,
    pub(crate) source: Option<Source>,
    pub(crate) machine: Option<Machine>,
    pub(crate) ports: [Port; 2],
    pub(crate) vms: [Vm; 2],
    /// Where the VM runs, or is about to.
    pub(crate) at: At,
    pub(crate) link: Option<Link>,
    /// B has claimed the device since its VM came.
    pub(crate) claimed: bool,
    /// B runs rings by a claim that must not be granted: why.
    pub(crate) wrong: Option<String>,
    /// B has heard from A since it was started.
    pub(crate) numbers_known: bool,
    /// B has asked to go home.
    pub(crate) going_home: bool,
    /// It had a link to A then: a migration may have begun.
    pub(crate) ready_home: bool,
    next: u64,
    /// How often A has been started again.
    pub(crate) processes: u64,
    /// What happened, for whoever wonders.
    log: Vec<String>,
    pub(crate) granted: u32,
    pub(crate) returned: u32,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            dice: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1,
            ledger: Ledger::Local(Epoch(1)),
            offered: false,
            writing: None,
            borrowed: Borrowed::Nothing,
            recording: None,
            source: Some(Source::serving(Epoch(1))),
            machine: Some(Machine::Gone),
            ports: Default::default(),
            vms: [Vm::booted(), Vm::booted()],
            at: At::A,
            link: None,
            claimed: false,
            wrong: None,
            numbers_known: false,
            going_home: false,
            ready_home: false,
            next: 1,
            processes: 0,
            log: Vec::new(),
            granted: 0,
            returned: 0,
        }
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.dice = self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.dice >> 33) % limit
    }

    pub(crate) fn note(&mut self, text: impl FnOnce() -> String) {
        let text = text();
        self.log.push(text);
    }

    fn queue(&mut self) -> usize {
        self.below(QUEUES as u64) as usize
    }

    fn alive(&self, at: At) -> bool {
        match at {
            At::A => self.source.is_some(),
            At::B => self.machine.is_some(),
        }
    }

    fn has_device(&self) -> At {
        match self.ledger {
            Ledger::Local(_) => At::A,
            Ledger::Lent(_) => At::B,
        }
    }

    /// One thing happens.
    pub(crate) fn step(&mut self) {
        match self.below(100) {
            0..=13 => self.guest_asks(),
            14..=25 => self.request_ends(),
            26..=38 => self.deliver_to_a(),
            39..=51 => self.deliver_to_b(),
            52..=56 => self.ledger_written(true),
            57 if self.below(4) == 0 => self.ledger_written(false),
            57..=60 => self.record(),
            61..=65 => self.connect(),
            66 if self.below(2) == 0 => self.link = None,
            66..=75 => self.start_rings(),
            76..=80 => self.stop(),
            81..=86 => self.offer(),
            87 if self.below(3) == 0 => self.withdraw(),
            87..=93 => self.migrate(),
            94 if self.below(3) == 0 => self.turn_round(),
            95 if self.below(2) == 0 => self.kill(At::A),
            96 if self.below(2) == 0 => self.kill(At::B),
            _ => {
                self.revive(At::A);
                self.revive(At::B);
            }
        }
        self.check();
    }

    /// What holds at any time.
    fn check(&self) {
        if let Some(source) = &self.source {
            let local = matches!(self.ledger, Ledger::Local(_));
            assert!(
                !source.may_serve() || local && self.writing.is_none(),
                "A serves a device that it has lent"
            );
            assert!(!source.serves_borrower() || !local, "A executes for B what it has not lent");
        }
        let port = &self.ports[At::B as usize];
        if let (Some(Machine::Here(borrower)), Ledger::Local(epoch)) = (&self.machine, self.ledger) {
            let runs = port.runs.iter().any(|runs| *runs);
            assert!(!runs || borrower.is_gone(), "B goes on with what A has taken in epoch {epoch}");
        }
    }

    /// Whether what a ring at this host takes is executed.
    fn executes(&self, at: At) -> bool {
        match (&self.source, at) {
            (Some(source), At::A) => source.may_serve(),
            (Some(source), At::B) => {
                source.serves_borrower()
                    && self.link.is_some()
                    && matches!(self.machine, Some(Machine::Here(_)))
            }
            (None, _) => false,
        }
    }

    fn guest_asks(&mut self) {
        let (queue, at) = (self.queue(), self.at as usize);
        let ring = &mut self.vms[at].rings[queue];
        if !self.ports[at].runs[queue] || ring.heads.len() == usize::from(SIZE) {
            return;
        }
        let head = (0..SIZE).find(|head| ring.heads.iter().all(|(other, _)| other != head));
        self.next += 1;
        ring.heads.push((head.expect("one is free"), self.next));
        ring.base = ring.base.wrapping_add(1);
        if at == At::B as usize && matches!(self.machine, Some(Machine::Coming(_))) {
            self.vms[at].behind_claim[queue] += 1;
        }
        let ring = &self.vms[at].rings[queue];
        self.vms[at].marked[queue] = ring.heads.clone();
    }

    fn request_ends(&mut self) {
        let (queue, at) = (self.queue(), self.at);
        let count = self.vms[at as usize].rings[queue].heads.len() as u64;
        if !self.ports[at as usize].runs[queue] || count == 0 || !self.executes(at) {
            return;
        }
        let which = self.below(count) as usize;
        let vm = &mut self.vms[at as usize];
        vm.rings[queue].heads.remove(which);
        vm.rings[queue].used = vm.rings[queue].used.wrapping_add(1);
        vm.marked[queue] = vm.rings[queue].heads.clone();
    }

    /// A VMM starts its rings one after the other; messages arrive meanwhile, and processes die.
    fn start_rings(&mut self) {
        let first = self.queue();
        for queue in (0..QUEUES).map(|queue| (first + queue) % QUEUES) {
            self.start_ring(queue);
            for _ in 0..self.below(3) {
                match self.below(6) {
                    0 => self.guest_asks(),
                    1 => self.deliver_to_a(),
                    2 => self.deliver_to_b(),
                    3 => self.ledger_written(true),
                    4 => self.connect(),
                    _ if self.below(20) == 0 => self.kill(self.at),
                    _ => self.record(),
                }
            }
        }
    }

    fn start_ring(&mut self, queue: usize) {
        let at = self.at;
        if !self.alive(at) || self.vms[at as usize].started[queue] {
            return;
        }
        let vm = &mut self.vms[at as usize];
        vm.started[queue] = true;
        self.log.push(format!("{at:?} starts queue {queue}"));
        let vm = &mut self.vms[at as usize];
        let start = RingStart {
            queue: QueueIndex(queue as u16),
            size: SIZE,
            base: vm.start_at[queue],
            used: vm.rings[queue].used,
        };
        let marked = vm.marked[queue].clone();
        let port = &mut self.ports[at as usize];
        port.waiting[queue] = Some((start, marked));
        self.start_waiting(at, queue);
    }

    fn start_waiting(&mut self, at: At, queue: usize) {
        match at {
            At::A => self.start_at_a(queue),
            At::B => self.start_at_b(queue),
        }
    }

    /// The VMM stops its rings.
    fn stop(&mut self) {
        let at = self.at;
        if !self.alive(at) || !self.vms[at as usize].started.iter().any(|started| *started) {
            return;
        }
        for queue in 0..QUEUES {
            let (vm, port) = (&mut self.vms[at as usize], &mut self.ports[at as usize]);
            if !std::mem::take(&mut vm.started[queue]) {
                continue;
            }
            let ran = std::mem::take(&mut port.runs[queue]);
            if ran {
                vm.start_at[queue] = vm.rings[queue].base;
            }
            // A ring that never ran in this process: only its heads are known.
            if let Some((_, marked)) = port.waiting[queue].take().filter(|_| !port.knows[queue]) {
                port.unknown[queue] = marked;
            }
            port.stopped_at[queue] = Some(vm.start_at[queue]);
            self.ring_left(at, queue);
        }
        let list = self.ports[at as usize].list(&self.vms[at as usize]);
        self.note(|| format!("{at:?} stops: {} requests", list.requests.len()));
        self.rings_stopped(at, list);
    }

    fn stopped(&self) -> bool {
        !self.vms[self.at as usize].started.iter().any(|started| *started)
    }

    /// The VM, stopped, goes to the other host, where a new VMM waits.
    fn migrate(&mut self) {
        let to = if self.at == At::A { At::B } else { At::A };
        let ready = match to {
            // After a failure it has to be offered again.
            At::B => matches!(&self.machine, Some(Machine::Coming(there)) if there.name() == "prepared"),
            // Between a VM that turned round and its next switchover lies a whole migration, which begins with an offer
            // over a link that is open (`offer.rs` in belay-agent), and outlasts a write that is under way. (With `belay
            // migrate`, the earlier return was called off before.)
            At::A => self.ready_home && self.writing.is_none(),
        };
        if !self.stopped() || !ready || self.has_device() != self.at {
            return;
        }
        self.note(|| format!("migrates to {to:?}"));
        let vm = self.vms[self.at as usize].clone();
        self.claimed = false;
        self.vms[to as usize] = Vm { marked: Default::default(), started: Default::default(), ..vm };
        // What an earlier VMM's rings were is over.
        if to == At::A {
            self.ports[0] = Port::default();
            self.ready_home = false;
        }
        self.at = to;
    }

    /// The VM gives up where it has gone, and goes on where its memory was before; or the other way round.
    fn turn_round(&mut self) {
        let other = if self.at == At::A { At::B } else { At::A };
        // A VM that has run where it came to is not started again where it was.
        if self.has_device() == other && !self.claimed {
            self.leave_to(other);
        }
    }

    fn leave_to(&mut self, other: At) {
        self.stop();
        self.note(|| format!("turns round to {other:?}"));
        self.ready_home = false;
        self.at = other;
    }

    /// A process dies. Its VMM starts its rings again where the used index is, with the in-flight region.
    fn kill(&mut self, at: At) {
        match at {
            At::A => {
                if self.source.take().is_none() {
                    return;
                }
                // The write may have reached the disk.
                if let Some(written) = self.writing.take()
                    && self.below(2) == 0
                {
                    self.commit(written);
                }
            }
            At::B => {
                if self.machine.take().is_none() {
                    return;
                }
                if self.below(2) == 0 {
                    self.record();
                }
                self.recording = None;
                self.wrong = None;
                self.numbers_known = false;
            }
        }
        self.note(|| format!("{at:?} dies"));
        self.link = None;
        self.ports[at as usize] = Port::default();
        let vm = &mut self.vms[at as usize];
        for queue in 0..QUEUES {
            vm.started[queue] = false;
            vm.start_at[queue] = vm.rings[queue].used;
        }
    }

    fn commit(&mut self, written: Ledger) {
        self.note(|| format!("A's ledger: {written:?}"));
        match written {
            Ledger::Lent(_) => self.granted += 1,
            Ledger::Local(_) => self.returned += 1,
        }
        self.ledger = written;
        self.offered = false;
    }

    fn revive(&mut self, at: At) {
        match at {
            At::A => self.revive_a(),
            At::B => self.revive_b(),
        }
    }

    /// Everything is well again: whoever has the device serves the VM there, with all its requests.
    pub(crate) fn settle(&mut self) {
        for _ in 0..40 {
            self.revive(At::A);
            self.revive(At::B);
            self.ledger_written(true);
            self.record();
            self.connect();
            for _ in 0..8 {
                self.deliver_to_a();
                self.deliver_to_b();
                self.ledger_written(true);
            }
            self.check();
        }
        let owner = self.has_device();
        if self.at != owner {
            self.leave_to(owner);
        }
        for _ in 0..3 {
            for queue in 0..QUEUES {
                self.start_ring(queue);
            }
            for _ in 0..8 {
                self.connect();
                self.deliver_to_a();
                self.deliver_to_b();
                self.ledger_written(true);
                self.record();
            }
            self.check();
        }
        // A start of its rings at the owner may have decided that the VM comes home: it is there already.
        for queue in 0..QUEUES {
            let (at, here) = (self.at as usize, self.has_device());
            assert_eq!(self.at, here, "the device is where its VM is");
            assert!(self.ports[at].runs[queue], "queue {queue} runs at {here:?}: {}", self.told());
        }
    }

    pub(crate) fn told(&self) -> String {
        let b = match &self.machine {
            Some(Machine::Coming(destination)) => destination.name(),
            Some(Machine::Here(borrower)) => borrower.name(),
            Some(Machine::Gone) => "gone",
            None => "dead",
        };
        let a = self.source.as_ref().map_or("dead", Source::name);
        format!("A is {a}, B is {b}, {:?}", self.ledger)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let from = self.log.len().saturating_sub(100);
            println!("{}\n{}", self.log[from..].join("\n"), self.told());
        }
    }
}
