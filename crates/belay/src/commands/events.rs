//! `belay events`.

use super::Context;
use crate::error::Failure;
use crate::model::Event;
use crate::output;

pub(super) async fn run(context: &Context, follow: bool) -> Result<(), Failure> {
    let mut lines = context.client.follow(&format!("/v1/events?follow={follow}")).await?;
    while let Some(line) = lines.next().await? {
        match serde_json::from_str::<Event>(&line) {
            Ok(event) if !context.json => output::print(&text(&event))?,
            _ => output::print(&line)?,
        }
    }
    Ok(())
}

fn text(event: &Event) -> String {
    let time = event.time.as_str().map_or_else(|| event.time.to_string(), ToOwned::to_owned);
    let subject = event.device.as_ref().or(event.vm.as_ref());
    let mut words = vec![time, event.kind.clone()];
    words.extend(subject.cloned());
    if let Some(phase) = &event.phase {
        words.push(match &event.edge {
            Some(edge) => format!("{phase} {edge}"),
            None => phase.clone(),
        });
    }
    if let Some(duration) = event.duration_ms {
        words.push(format!("({duration:.1} ms)"));
    }
    if !event.message.is_empty() {
        words.push(event.message.clone());
    }
    output::plain(&words.join("  "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_is_told_with_its_device_edge_and_duration() {
        let line = r#"{"seq":4,"time":"2024-05-01T10:00:00Z","kind":"handover","device":"data","phase":"drain",
            "edge":"end","duration_ms":1.25,"message":"16 in flight"}"#;
        let event: Event = serde_json::from_str(line).unwrap();
        assert_eq!(text(&event), "2024-05-01T10:00:00Z  handover  data  drain end  (1.2 ms)  16 in flight");
    }
}
