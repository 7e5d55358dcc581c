//! `defib image`: builds, prints and checks repair images.

use std::path::Path;

use anyhow::{Context, Result, bail};
use guest::{LinkAddr, Machine};
use hv_hooks::qemu::{AttachOptions, Qemu};
use repair_image::{GuestLayer, KernelFacts, KernelLayer, Verification, verify};

use crate::Outcome;
use crate::cli::{ImageAction, ImageArguments, KnowledgeSources};
use crate::knowledge;

/// Runs `defib image`.
///
/// # Errors
/// When a file or the VM can't be used.
pub fn run(arguments: &ImageArguments) -> Result<Outcome> {
    match &arguments.action {
        ImageAction::Build { qmp, knowledge, output } => build(qmp.as_deref(), knowledge, output),
        ImageAction::Inspect { image, address } => inspect(image, address),
        ImageAction::Verify { image, qmp } => check(image, qmp),
    }
}

fn build(qmp: Option<&Path>, sources: &KnowledgeSources, output: &Path) -> Result<Outcome> {
    let sources = knowledge::sources(sources);
    let (layer, guest) = match qmp {
        None => {
            let Some(vmlinux) = &sources.vmlinux else {
                bail!("name a kernel: --vmlinux or --qmp")
            };
            (guard::kernel_layer(vmlinux, &sources)?.into(), None)
        }
        Some(qmp) => {
            let machine = Qemu::attach(AttachOptions::new(qmp))?;
            let learned = guard::learn(machine.phys(), &sources, &[])?;
            machine.detach()?;
            let Some(layer) = learned.kernel.layer else {
                bail!(
                    "no debug information for this kernel: an image file needs --vmlinux or --debug-dir"
                )
            };
            (layer, Some(learned.layer))
        }
    };
    layer
        .write_image(output, guest.as_ref())
        .with_context(|| format!("cannot write {}", output.display()))?;
    println!("{}: {} bytes", output.display(), std::fs::metadata(output)?.len());
    Ok(Outcome::Done)
}

fn inspect(image: &Path, addresses: &[String]) -> Result<Outcome> {
    let layer =
        KernelLayer::open(image).with_context(|| format!("cannot use {}", image.display()))?;
    println!("kernel   {}\nbuild id {}", layer.banner().trim(), layer.build_id());
    for section in layer.inspect() {
        let records =
            section.records.map_or_else(String::new, |count| format!("{count:>10} records"));
        println!("{:<24} {:>10} bytes {records}", section.name, section.bytes);
    }
    if let Some(guest) = layer.guest_layer()? {
        print_guest(&guest);
    }
    for address in addresses {
        let digits = address.trim_start_matches("0x");
        let at = LinkAddr(
            u64::from_str_radix(digits, 16).with_context(|| format!("address {address:?}"))?,
        );
        print_address(&layer, at);
    }
    Ok(Outcome::Done)
}

fn print_guest(guest: &GuestLayer) {
    println!(
        "guest layer: slide {:#x}, text at guest-physical {:#x}, {} CPUs, {} modules, IDT {} gates",
        guest.placement.slide,
        guest.text_phys,
        guest.placement.per_cpu.len(),
        guest.modules.len(),
        guest.idt.len()
    );
    for module in &guest.modules {
        println!("  {}", module.name);
    }
}

fn print_address(layer: &KernelLayer, at: LinkAddr) {
    let knowledge = layer.knowledge();
    match knowledge.function_at(at) {
        Some(symbol) => {
            println!("{at:#x} {}+{:#x}/{:#x}", symbol.name, at - symbol.at, symbol.size)
        }
        None => println!("{at:#x} ?"),
    }
    for level in knowledge.source(at) {
        println!(
            "    {} at {}:{}",
            level.function.as_deref().unwrap_or("?"),
            level.file,
            level.line
        );
    }
}

fn check(image: &Path, qmp: &Path) -> Result<Outcome> {
    let layer =
        KernelLayer::open(image).with_context(|| format!("cannot use {}", image.display()))?;
    let Some(guest) = layer.guest_layer()? else {
        bail!("the image has no guest layer: build it with --qmp")
    };
    let facts = KernelFacts::of_layer(&layer)?;
    let machine = Qemu::attach(AttachOptions::new(qmp))?;
    let report = verify(machine.phys(), &facts, &guest);
    machine.detach()?;
    print_report(&report);
    Ok(if report.is_clean() { Outcome::Done } else { Outcome::NotSaved })
}

fn print_report(report: &Verification) {
    if !report.same_boot {
        println!("another boot than the image was taken from");
    }
    println!("{} pages compared, {} differ", report.pages, report.differing.len());
    for page in &report.differing {
        let why = page.legitimate_reason().unwrap_or("no legitimate reason known");
        println!("  {:#x} {}: {why}", page.at, page.symbols.join(" "));
    }
    for piece in &report.damage {
        println!("  {}", piece.words());
    }
    if !report.gates.is_empty() {
        println!("IDT gates that differ: {:?}", report.gates);
    }
    println!("{}", if report.is_clean() { "clean" } else { "NOT CLEAN" });
}
