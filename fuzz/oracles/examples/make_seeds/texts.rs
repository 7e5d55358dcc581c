//! Seeds that are text: monitors, packets, descriptions of registers, VMCOREINFO, the policy.

use guest::Reg;
use hv_hooks::qemu::rsp;
use quarantine::Policy;

use crate::{Outcome, Seeds};

pub(crate) fn add(seeds: &Seeds) -> Outcome<()> {
    for (name, line) in [
        (
            "greeting",
            r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}"#,
        ),
        (
            "return",
            r#"{"return": {"status": "running", "singlestep": false, "running": true}, "id": 7}"#,
        ),
        (
            "error",
            r#"{"error": {"class": "CommandNotFound", "desc": "The command x has not been found"}}"#,
        ),
        (
            "event",
            r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "GUEST_PANICKED", "data": {"action": "pause"}}"#,
        ),
    ] {
        seeds.add("qmp_line", name, line)?;
    }
    seeds.add("hmp_text", "mtree", MTREE)?;
    seeds.add("hmp_text", "registers", REGISTERS)?;
    seeds.add("hmp_text", "devices", DEVICES)?;
    seeds.add(
        "hmp_text",
        "host_address",
        "Host virtual address for 0x0 (m) is 0x7f71a3fff000\r\n",
    )?;
    seeds.add("hmp_text", "port", "portb[0xafe2] = 0x0e\r\n")?;
    let mut wire = b"+".to_vec();
    for packet in [&b"OK"[..], b"T05thread:p1.1;", b"W00", b"}$#*", b"00ff7e", b"E22"] {
        wire.extend(rsp::encode(packet));
    }
    seeds.add("rsp_packets", "answers", &wire)?;
    seeds.add("rsp_packets", "run_length", "$0* #7a+$qSupported#37")?;
    seeds.add("rsp_packets", "stop", "T05thread:01;")?;
    seeds.add("target_xml", "registers", target_xml())?;
    seeds.add("policy", "defaults", Policy::defaults_text())?;
    seeds.add(
        "policy",
        "few",
        "strikes = 1\nrungs = [\"return_error\"]\nwhen_refused = \"stop\"\n",
    )?;
    seeds.add("vmcoreinfo", "v6_1", VMCOREINFO)
}

/// An answer to `g` behind its length, then a description in an order of its own.
fn target_xml() -> Vec<u8> {
    let mut xml = String::from("<feature><reg name=\"pad\" bitsize=\"80\" regnum=\"5\"/>\n");
    let mut answer = "00".repeat(10);
    for (index, &reg) in Reg::ALL.iter().enumerate() {
        let name = match reg {
            Reg::Rflags => "eflags",
            Reg::KernelGsBase => "k_gs_base",
            other => other.name(),
        };
        let bytes = if matches!(reg, Reg::Rflags | Reg::Cs | Reg::Ss) { 4 } else { 8 };
        xml += &format!("<reg name=\"{name}\" bitsize=\"{}\" type=\"int\"/>\n", bytes * 8);
        answer += &format!("{:02x}", index + 1).repeat(bytes);
    }
    xml += "<!--reg name=\"x\" bitsize=\"64\"/--></feature>";
    let mut out = (answer.len() as u16).to_le_bytes().to_vec();
    out.extend(answer.bytes());
    out.extend(xml.bytes());
    out
}

/// From QEMU 7.2, shortened.
const MTREE: &str = "FlatView #0\r\n AS \"I/O\", root: io\r\n Root memory region: io\r\n  \
    0000000000000a00-0000000000000a17 (prio 0, i/o): acpi-mem-hotplug\r\n  \
    000000000000afe0-000000000000afe3 (prio 0, i/o): acpi-gpe0\r\n\r\nFlatView #1\r\n \
    AS \"memory\", root: system\r\n Root memory region: system\r\n  \
    0000000000000000-000000000009ffff (prio 0, ram): m\r\n  \
    00000000000f0000-00000000000fffff (prio 0, rom): m @00000000000f0000\r\n  \
    0000000000100000-000000000fffffff (prio 0, ram): m @0000000000100000 KVM\r\n  \
    00000000febf0400-00000000febf041f (prio 0, i/o): vga ioports remapped\r\n\r\n";
/// From QEMU 7.2, shortened.
const REGISTERS: &str = "\r\nCPU#0\r\nRIP=ffffffff93b063d6 RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1\r\n\
    TR =0040 fffffe0000003000 00004087 00008900 DPL=0 TSS64-avl\r\nGDT=     fffffe0000001000 0000007f\r\n\
    IDT=     fffffe0000000000 00000fff\r\nCR0=80050033 CR2=0 CR3=0000000001f2a000 CR4=000006b0\r\n";
/// From QEMU 7.2, shortened.
const DEVICES: &str = "Memory device [dimm]: \"d\"\r\n  addr: 0x100000000\r\n  slot: 2\r\n  node: 0\r\n  \
    size: 2097152\r\n  memdev: /objects/defib-memory-1\r\n  hotplugged: true\r\n";
/// Of a kernel 6.1, shortened.
const VMCOREINFO: &str = "OSRELEASE=6.1.0-1-cloud-amd64\nBUILD-ID=00ff\nPAGESIZE=4096\n\
    SYMBOL(swapper_pg_dir)=ffffffff96610000\nSYMBOL(_stext)=ffffffff94a00000\n\
    SYMBOL(kallsyms_names)=ffffffff95000000\nSYMBOL(kallsyms_num_syms)=ffffffff95000000\n\
    SYMBOL(kallsyms_token_table)=ffffffff95000000\nSYMBOL(kallsyms_token_index)=ffffffff95000000\n\
    SYMBOL(kallsyms_offsets)=ffffffff95000000\nSYMBOL(kallsyms_relative_base)=ffffffff95000000\n\
    NUMBER(phys_base)=-318767104\nNUMBER(pgtable_l5_enabled)=1\nKERNELOFFSET=13a00000\n";
