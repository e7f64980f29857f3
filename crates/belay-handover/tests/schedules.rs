//! The machines of both hosts joined, without I/O: a VM that moves, turns round and comes home, messages that are
//! slow, links that break, processes that die and start again from their ledgers, in random order.
//!
//! What counts is the memory of the VM at either host, which requests are in flight there, and what A's ledger says.
//! A ring may run only with exactly the requests that are in flight in it, and only at the host that has the device.
//! In the end, when all is well again, every ring runs there.

mod world;

use world::World;

/// Schedules of one run of the test; `BELAY_SCHEDULES` asks for more, `BELAY_SEED` for one.
const SCHEDULES: u64 = 8000;
const STEPS: u32 = 400;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

#[test]
fn every_schedule_ends_with_one_host_that_has_every_request() {
    let seeds = match number("BELAY_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("BELAY_SCHEDULES").unwrap_or(SCHEDULES),
    };
    let (mut out, mut home) = (0, 0);
    for seed in seeds.clone() {
        let played = std::panic::catch_unwind(|| {
            let mut world = World::new(seed);
            for _ in 0..STEPS {
                world.step();
            }
            world.settle();
            (world.granted, world.returned)
        });
        match played {
            Ok((granted, returned)) => {
                out += granted;
                home += returned;
            }
            Err(_) => panic!("BELAY_SEED={seed} plays this schedule again"),
        }
    }
    println!("{out} handovers, {home} ways home");
    assert!(seeds.end - seeds.start == 1 || out > 1000 && home > 100, "{out} handovers, {home} ways home");
}
