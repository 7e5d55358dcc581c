//! What must hold of the gdb stub's packets and of its description of the registers.

use guest::{Reg, Registers};
use hv_hooks::qemu::rsp;
use hv_hooks::qemu::target_xml::{RegisterFile, parse_includes};

use crate::input::Input;

/// Packets on the wire: each is taken out of the buffer, and is the same when framed again.
///
/// # Panics
/// When that does not hold.
pub fn rsp_packets(data: &[u8]) {
    let mut buffer = data.to_vec();
    loop {
        let before = buffer.len();
        match rsp::decode(&mut buffer) {
            Ok(Some(packet)) => {
                let mut framed = rsp::encode(&packet);
                assert_eq!(rsp::decode(&mut framed), Ok(Some(packet.clone())));
                assert!(framed.is_empty());
                payload(&packet);
            }
            Ok(None) => break,
            // Its end was not seen: nothing can be taken out, the connection is given up.
            Err(rsp::PacketError::TooLong) if buffer.len() == before => break,
            Err(_) => {}
        }
        assert!(buffer.len() < before, "a packet stays in the buffer");
    }
    payload(data);
    let mut framed = rsp::encode(data);
    match rsp::decode(&mut framed) {
        Ok(packet) => assert_eq!(packet.as_deref(), Some(data)),
        Err(error) => assert!(data.len() > 1000, "{error}"),
    }
}

fn payload(packet: &[u8]) {
    if let Ok(rsp::StopReply::Signal { signal, .. }) = rsp::parse_stop(packet) {
        assert_eq!(rsp::parse_hex_u64(&packet[1..3]), Ok(u64::from(signal)));
    }
    if let Ok(bytes) = rsp::parse_hex_bytes(packet) {
        let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(text.as_bytes().eq_ignore_ascii_case(packet));
    }
    if let Ok(number) = rsp::parse_hex_u64(packet) {
        let text = String::from_utf8_lossy(packet).to_lowercase();
        let digits = text.trim_start_matches('0');
        assert_eq!(format!("{number:x}"), if digits.is_empty() { "0" } else { digits });
    }
}

/// A target description and an answer to `g`: a register that was read can be written back the same.
///
/// # Panics
/// When that does not hold.
pub fn target_xml(data: &[u8]) {
    let mut input = Input::new(data);
    let answer = input.part();
    let xml = String::from_utf8_lossy(input.rest()).into_owned();
    assert!(
        parse_includes(&xml).iter().all(|name| xml.contains(name.as_str()) || xml.contains("<!--"))
    );
    let Ok(file) = RegisterFile::parse(&[xml]) else { return };
    let Ok(registers) = file.decode(answer) else { return };
    let writes = |wanted: &Registers, current: &Registers| {
        file.writes(wanted, current).expect("a register of the file")
    };
    for packet in writes(&registers, &Registers::unknown()) {
        let (_, digits) = packet.split_once('=').expect("P number=digits");
        let digits = digits.as_bytes();
        let known = |part: &[u8]| part.eq_ignore_ascii_case(digits);
        assert!(answer.windows(digits.len()).any(known), "{packet} was not in the answer");
    }
    assert!(writes(&registers, &registers).is_empty());
    let other = Registers::unknown().with(Reg::Rax, !registers.get(Reg::Rax).unwrap_or(0));
    assert_eq!(writes(&other, &registers).len(), 1);
}
