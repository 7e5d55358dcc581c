//! Assembles the payload and hands its bytes and labels to `src/payload.rs`. Nothing else is built here.

use std::error::Error;
use std::fmt::Write;
use std::path::PathBuf;
use std::{env, fs};

use object::{Object, ObjectSection, ObjectSymbol};

const SOURCE: &str = "payload/payload.S";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={SOURCE}");
    println!("cargo::rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let object = out.join("payload.o");
    let mut compiler = cc::Build::new().get_compiler().to_command();
    let status = compiler.args(["-c", SOURCE, "-o"]).arg(&object).status()?;
    if !status.success() {
        return Err(format!("the compiler could not assemble {SOURCE}: {status}").into());
    }
    fs::write(out.join("payload_code.rs"), code(&fs::read(object)?)?)?;
    Ok(())
}

/// Rust source with the bytes of `.text` and the offsets of its labels.
fn code(elf: &[u8]) -> Result<String, Box<dyn Error>> {
    let file = object::File::parse(elf)?;
    let text = file.section_by_name(".text").ok_or("the payload has no .text")?;
    if text.relocations().next().is_some() {
        return Err("the payload is not position-independent: it has relocations".into());
    }
    let mut source = String::new();
    for (name, label) in [("ENTRY", "payload_entry"), ("FINISH", "payload_finish")] {
        let symbol = file.symbols().find(|symbol| symbol.name() == Ok(label));
        let at = symbol.ok_or_else(|| format!("the payload has no label {label}"))?.address();
        writeln!(source, "const {name}: u64 = {at};")?;
    }
    writeln!(source, "const CODE: &[u8] = &{:?};", text.data()?)?;
    Ok(source)
}
