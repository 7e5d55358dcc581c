//! What must hold of the text that QEMU's monitors send: QMP lines and the human monitor's answers.

use hv_hooks::qemu::hmp::{self, MapEntry};
use hv_hooks::qemu::qmp::{self, Message};
use serde_json::{Value, json};

/// A QMP line is one of four kinds of message or refused; what was understood is in the line.
///
/// # Panics
/// When that does not hold.
pub fn qmp_line(data: &[u8]) {
    let found = match qmp::parse_line(data) {
        Ok(found) => found,
        Err(error) => return assert!(error.to_string().len() < 1024, "an error repeats the line"),
    };
    let value: Value = serde_json::from_slice(data).expect("a message that is no JSON");
    match &found {
        Message::Return(result) => assert_eq!(value.get("return"), Some(result)),
        Message::Event(event) => assert_eq!(value["event"], event.name),
        Message::Error { .. } => assert!(value.get("error").is_some()),
        Message::Greeting(_) => assert!(value.pointer("/QMP/version/qemu").is_some()),
    }
    let again = match &found {
        Message::Return(result) => json!({ "return": result }),
        Message::Event(event) => json!({ "event": event.name, "data": event.data }),
        Message::Error { class, desc } => json!({ "error": { "class": class, "desc": desc } }),
        Message::Greeting([major, minor, micro]) => {
            let qemu = json!({ "major": major, "minor": minor, "micro": micro });
            json!({ "QMP": { "version": { "qemu": qemu } } })
        }
    };
    let again = qmp::parse_line(again.to_string().as_bytes()).expect("written again");
    assert_eq!(again, found);
}

fn ascending(entries: &[MapEntry]) {
    assert!(entries.iter().all(|entry| entry.start <= entry.last));
    assert!(entries.is_sorted_by_key(|entry| entry.start));
}

/// Answers of the human monitor: ranges are ordered, and whatever was understood stands in the text.
///
/// # Panics
/// When that does not hold.
pub fn hmp_text(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let map = hmp::parse_memory_map(&text);
    ascending(&map.memory);
    ascending(&map.ports);
    for entry in &map.ports {
        if let Some((first, count)) = map.ports_of(&entry.name) {
            assert!(u32::from(first) + u32::from(count) <= 1 << 17);
        }
    }
    for device in hmp::parse_memory_devices(&text) {
        assert!(text.contains(&device.backend) && text.contains(&device.slot.to_string()));
    }
    let lower = text.to_lowercase();
    let contains = |number: u64| assert!(lower.contains(&format!("{number:x}")), "{number:#x}");
    hmp::parse_host_address(&text).inspect(|address| contains(address.0));
    hmp::parse_port(&text).inspect(|value| contains(*value));
    hmp::parse_register(&text, "CR3").inspect(|value| contains(*value));
    if let Some(tables) = hmp::parse_tables(&text) {
        for table in [tables.idt, tables.gdt, tables.tss] {
            contains(table.base.0);
        }
        assert!(tables.cpl <= 9);
    }
}
