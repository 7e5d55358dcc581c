//! What must hold of every parser that reads guest memory, QMP, gdb packets or ELF files, whatever bytes it is
//! given: one function a parser, which panics when it does not. Fuzz targets and `cargo test` call these.
#![forbid(unsafe_code)]

mod console;
mod crash;
mod files;
mod input;
mod layers;
mod memory;
mod monitor;
mod mutate;
mod repair;
pub mod scene;
mod stub;
mod tables;

pub use console::console;
pub use crash::{crash, instructions, unwinding};
pub use files::{migration_stream, module_object, vmcore};
pub use layers::{guest_layer, kernel_layer};
pub use memory::{KERNEL, kernel_memory, page_tables, vmcoreinfo};
pub use monitor::{hmp_text, qmp_line};
pub use mutate::Mutator;
pub use repair::{payload_results, policy};
pub use stub::{rsp_packets, target_xml};
pub use tables::{btf, notes, unwind_tables};

/// A parser's oracle.
pub type Oracle = fn(&[u8]);

/// Every oracle by the name of its fuzz target and folder of seeds.
pub const ORACLES: [(&str, Oracle); 21] = [
    ("btf", btf),
    ("console", console),
    ("crash", crash),
    ("guest_layer", guest_layer),
    ("hmp_text", hmp_text),
    ("instructions", instructions),
    ("kernel_layer", kernel_layer),
    ("kernel_memory", kernel_memory),
    ("migration_stream", migration_stream),
    ("module_object", module_object),
    ("notes", notes),
    ("page_tables", page_tables),
    ("payload_results", payload_results),
    ("policy", policy),
    ("qmp_line", qmp_line),
    ("rsp_packets", rsp_packets),
    ("target_xml", target_xml),
    ("unwind_tables", unwind_tables),
    ("unwinding", unwinding),
    ("vmcore", vmcore),
    ("vmcoreinfo", vmcoreinfo),
];

/// A seed, for tests that it is what it should be.
#[cfg(test)]
fn seed(target: &str, name: &str) -> Vec<u8> {
    let path = format!("{}/../seeds/{target}/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(path).expect("a seed")
}
