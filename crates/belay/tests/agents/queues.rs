//! As many queues as a disk can have.

use anyhow::ensure;
use belay_synthetic::Guest;

use crate::{DEPTH, boot, bring, hand_over, is_local, reconnect, run_until, with_bed};

const MOST: u16 = 64;

/// Works on all queues at a time; then one more request on each of them ends.
fn use_all(guest: &mut Guest) {
    guest.run(u64::from(MOST) * 10, 4);
    guest.drain();
    for queue in 0..usize::from(MOST) {
        // It does not offer a request for a block that another one is in flight for: then for another block.
        while !guest.offer(queue) {}
        guest.kick(queue);
    }
    guest.drain();
}

#[test]
fn sixty_four_queues_are_all_served_move_to_another_host_and_outlive_killed_agents() {
    with_bed(|bed| {
        let mut guest = boot(&bed.a, MOST, 300, 64)?;
        use_all(&mut guest);
        guest.fill(DEPTH);
        bed.a.kill_agent()?;
        bed.a.start_agent()?;
        reconnect(&mut guest, &bed.a);
        use_all(&mut guest);
        hand_over(&mut guest, &bed.a, &bed.b, "stay")?;
        use_all(&mut guest);
        guest.fill(DEPTH);
        bed.b.kill_agent()?;
        bed.b.start_agent()?;
        reconnect(&mut guest, &bed.b);
        use_all(&mut guest);
        bring(&bed.b.folder)?;
        run_until(&mut guest, &bed.b, "the disk at its new host", is_local)?;
        use_all(&mut guest);
        guest.verify();
        Ok(())
    });
}

#[test]
fn more_queues_than_a_disk_can_have_are_refused() {
    with_bed(|bed| {
        let said = boot(&bed.a, MOST + 1, 0, 65).err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(said.contains("1 to 64"), "{said}");
        Ok(())
    });
}
