//! Seeds that are binary: files and memory made by compiling `kernel.c`, tables and dumps laid out by hand.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use defib_fuzz_oracles::KERNEL;
use object::{Object, ObjectSymbol};
use repair_image::{compile, payload};
use serde_json::json;

use crate::{Outcome, Seeds};

const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/make_seeds");
/// Where VMCOREINFO lies in the kernel's memory.
const INFO: usize = 0x1000;

pub(crate) fn add(seeds: &Seeds) -> Outcome<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path();
    let read = |name: &str| fs::read(folder.join(name));
    compile_kernel(folder)?;
    let btf = read("btf")?;
    seeds.add("btf", "kernel", &btf)?;
    seeds.add("module_object", "kernel", read("module.o")?)?;
    let frames = read("frames")?;
    seeds.add("unwind_tables", "kernel", unwind_tables(&frames))?;
    let layer = compile::vmlinux(&folder.join("vmlinux"), 1)?;
    let path = folder.join("layer");
    layer.write(&path)?;
    seeds.add("kernel_layer", "kernel", fs::read(path)?)?;
    seeds.add(
        "kernel_memory",
        "kernel",
        kernel_memory(read("image")?, &btf, &read("vmlinux")?)?,
    )?;
    seeds.add("guest_layer", "one_module", guest_layer()?)?;
    let mut notes = note(b"Xen\0", 3, b"linux\0");
    notes.extend(note(b"GNU\0", 3, &[0xab; 20]));
    seeds.add("notes", "build_id", &notes)?;
    seeds.add("vmcore", "two_segments", vmcore())?;
    let kdump = kdump()?;
    seeds.add("vmcore", "kdump", &kdump)?;
    seeds.add("vmcore", "flattened", flattened(&kdump))?;
    seeds.add("migration_stream", "two_cpus", migration_stream())?;
    seeds.add("page_tables", "four_levels", page_tables(false))?;
    seeds.add("page_tables", "five_levels", page_tables(true))?;
    seeds.add("payload_results", "second_call", mailbox()?)
}

fn run(folder: &Path, line: &str) -> Outcome<()> {
    let mut words = line.split_whitespace();
    let program = words.next().ok_or("no program")?;
    let status = Command::new(program).args(words).current_dir(folder).status()?;
    if status.success() { Ok(()) } else { Err(format!("{line}: {status}").into()) }
}

fn compile_kernel(folder: &Path) -> Outcome<()> {
    for name in ["kernel.c", "kernel.ld"] {
        fs::copy(Path::new(SOURCES).join(name), folder.join(name))?;
    }
    // Distances of the ORC table are filled in by nothing: rows at its own entries will do.
    fs::write(folder.join("ips"), [0u32, 4, 8].map(u32::to_le_bytes).concat())?;
    fs::write(
        folder.join("orcs"),
        [[8, 0, 0, 0, 5, 2], [0, 0, 0, 0, 5, 3], [0, 0, 0, 0, 0, 1]].concat(),
    )?;
    let compile = "gcc -g -O2 -mcmodel=kernel -ffreestanding -fno-pic -fno-stack-protector \
        -fcf-protection=none -fno-asynchronous-unwind-tables -fno-eliminate-unused-debug-types -c kernel.c";
    for line in [
        &format!("{compile} -o kernel.o"),
        "objcopy --add-section .orc_unwind_ip=ips --add-section .orc_unwind=orcs kernel.o module.o",
        "pahole -J kernel.o",
        "objcopy -O binary --only-section=.BTF --set-section-flags .BTF=alloc kernel.o btf",
        "ld -T kernel.ld --build-id=sha1 --no-warn-rwx-segments -static kernel.o -o linked",
        "objcopy -O binary -j .text -j .rodata linked image",
        "objcopy -O binary --only-section=.debug_frame --set-section-flags .debug_frame=alloc linked frames",
        "objcopy --remove-section .BTF --add-section .BTF=btf --add-section .orc_unwind_ip=ips \
            --add-section .orc_unwind=orcs linked vmlinux",
    ] {
        run(folder, line)?;
    }
    Ok(())
}

/// Address of the ORC table, distances, entries, `.debug_frame`: the first two behind their lengths.
fn unwind_tables(frames: &[u8]) -> Vec<u8> {
    let mut out = KERNEL.0.to_le_bytes().to_vec();
    let ips = [0x10i32, 0, 8, -4].map(i32::to_le_bytes).concat();
    let entries =
        [[8, 0, 0, 0, 5, 2], [16, 0, 0xf0, 0xff, 0x15, 2], [0, 0, 0, 0, 5, 3], [0; 6]].concat();
    for part in [ips, entries] {
        out.extend((part.len() as u16).to_le_bytes());
        out.extend(part);
    }
    out.extend(frames);
    out
}

/// The kernel's image with, behind it, its BTF, its symbol table and VMCOREINFO.
fn kernel_memory(mut image: Vec<u8>, btf: &[u8], vmlinux: &[u8]) -> Outcome<Vec<u8>> {
    let elf = object::File::parse(vmlinux)?;
    let mut symbols: Vec<(String, u64)> = elf
        .symbols()
        .filter(|symbol| symbol.address() >= KERNEL.0)
        .filter_map(|symbol| Some((symbol.name().ok()?.to_owned(), symbol.address() - KERNEL.0)))
        .collect();
    assert!(image.len() < INFO, "VMCOREINFO lies behind the image");
    image.resize(INFO + 0x400, 0);
    let mut put = |bytes: &[u8]| {
        image.resize(image.len().next_multiple_of(8), 0);
        let at = image.len() as u64;
        image.extend(bytes);
        at
    };
    let at = put(btf);
    symbols
        .extend([("__start_BTF".to_owned(), at), ("__stop_BTF".to_owned(), at + btf.len() as u64)]);
    let info = KERNEL.0 + INFO as u64;
    let pointer = put(&info.to_le_bytes());
    symbols.push(("vmcoreinfo_data".to_owned(), pointer));
    let [tokens, index, names, offsets] = kallsyms(&symbols);
    let lines = [
        ("kallsyms_names", put(&names)),
        ("kallsyms_num_syms", put(&(symbols.len() as u32).to_le_bytes())),
        ("kallsyms_token_table", put(&tokens)),
        ("kallsyms_token_index", put(&index)),
        ("kallsyms_offsets", put(&offsets)),
        ("kallsyms_relative_base", put(&KERNEL.0.to_le_bytes())),
        ("_stext", 0),
        ("swapper_pg_dir", 0x3f000),
    ];
    let mut text = String::from("OSRELEASE=9.9.9\nNUMBER(phys_base)=-16777216\nKERNELOFFSET=0\n");
    for (name, at) in lines {
        text += &format!("SYMBOL({name})={:x}\n", KERNEL.0 + at);
    }
    assert!(text.len() < 0x400, "VMCOREINFO has its place");
    image[INFO..INFO + text.len()].copy_from_slice(text.as_bytes());
    Ok(image)
}

/// Tokens of single characters, their index, names, offsets.
fn kallsyms(symbols: &[(String, u64)]) -> [Vec<u8>; 4] {
    let (mut tokens, mut index) = (Vec::new(), Vec::new());
    for code in 0..=255u8 {
        index.extend((tokens.len() as u16).to_le_bytes());
        tokens.extend(Some(code).filter(|code| (32..127).contains(code)));
        tokens.push(0);
    }
    let (mut names, mut offsets) = (Vec::new(), Vec::new());
    for (name, at) in symbols {
        names.push(name.len() as u8 + 1);
        names.push(b'T');
        names.extend(name.bytes());
        offsets.extend((-1 - *at as i32).to_le_bytes());
    }
    [tokens, index, names, offsets]
}

fn guest_layer() -> Outcome<Vec<u8>> {
    let text = json!([{ "start": "0xffffffffc0000000", "end": "0xffffffffc0001000" }]);
    let module = json!({
        "name": "m", "at": "0xffffffffc0002000", "state": "live", "taints": 0, "text": text,
        "ranges": text, "sections": [[".text", "0xffffffffc0000000"]], "build_id": "abcd",
    });
    let key =
        json!({ "at": "0xffffffffc0002000", "state": 0, "text": "0xffffffffc0000000", "name": 5 });
    let gate = json!({
        "vector": 14, "handler": "0xffffffff81000000", "ist": 0, "raw": vec![0; 16], "in_text": true,
    });
    let layer = json!({
        "banner": "Linux version 9.9.9", "build_id": "00ff", "found_by": { "banner": { "at": "0x2000" } },
        "confirmed_by": "only_one", "text_phys": "0x1000000",
        "placement": {
            "slide": 0, "root": "0x3f000", "five_level": false, "per_cpu": [1, 2],
            "text": { "start": "0xffffffff81000000", "end": "0xffffffff81001000" },
        },
        "boot": 9, "idt": [gate],
        "syscall_table": 3, "modules": [module], "module_keys": [key],
    });
    let json = serde_json::to_vec(&layer)?;
    let mut out = b"DEFIBGL1".to_vec();
    out.extend((json.len() as u64).to_le_bytes());
    out.extend(json);
    for word in [0, 0xffff_ffff_8100_0000, 2, 77, 0, 1, 0xffff_ffff_8100_2000, 1, 5u64] {
        out.extend(word.to_le_bytes());
    }
    Ok(out)
}

fn note(owner: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut out: Vec<u8> = [owner.len() as u32, desc.len() as u32, kind]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    for part in [owner, desc] {
        out.extend(part);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

/// A core of two segments, with a note of each kind.
fn vmcore() -> Vec<u8> {
    let mut notes = note(b"CORE\0", 1, &[3; 336]);
    notes.extend(note(b"QEMU\0", 0, &[4; 440]));
    let (phdrs, start) = (3u64, 64 + 3 * 56u64);
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([4, 0, 62, 0, 1, 0, 0, 0]);
    file.extend([0, 64, 0u64].iter().flat_map(|word| word.to_le_bytes()));
    file.extend(
        [0u16, 0, 64, 56, phdrs as u16, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes()),
    );
    file.resize(64, 0);
    let memory = start + notes.len() as u64;
    for (kind, offset, phys, size) in [
        (4, start, 0, notes.len() as u64),
        (1, memory, 0x1000, 64),
        (1, memory + 64, 0x10_0000, 64),
    ] {
        for word in [kind | 4u64 << 32, offset, 0xffff_8880_0000_0000 + phys, phys, size, size, 1] {
            file.extend(word.to_le_bytes());
        }
    }
    file.extend(notes);
    file.extend((0..128).collect::<Vec<u8>>());
    file
}

/// A kdump-compressed part of a split dump: a page of each compression, one that is stored, one left out.
fn kdump() -> Outcome<Vec<u8>> {
    let page: Vec<u8> = b"a page ".iter().copied().cycle().take(4096).collect();
    let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    zlib.write_all(&page)?;
    let pages = [
        (0u32, vec![0; 4096]),
        (1, zlib.finish()?),
        (2, lzokay_native::compress(&page).map_err(|error| format!("lzo: {error:?}"))?),
        (4, snap::raw::Encoder::new().compress_vec(&page)?),
        (0x20, zstd::bulk::compress(&page, 1)?),
    ];
    let notes = [note(b"CORE\0", 1, &[3; 336]), note(b"QEMU\0", 0, &[4; 440])].concat();
    let info = b"OSRELEASE=6.1.0\nSYMBOL(swapper_pg_dir)=ffffffff80001000\nNUMBER(phys_base)=0\n";
    let mut file = b"KDUMP   \x06\0\0\0".to_vec();
    file.resize(272, 0);
    file.extend(b"x86_64");
    file.resize(424, 0);
    // Status, block size, blocks of the sub header, of both bitmaps, page frames.
    file.extend([0u32, 4096, 1, 2, 6].iter().flat_map(|word| word.to_le_bytes()));
    file.resize(4096, 0);
    let text = 4096 + 104 + notes.len();
    let head = [0, 31 | 1 << 32, 0, 6, text, info.len(), 4096 + 104, notes.len(), 0, 0, 0, 6, 6];
    file.extend(head.iter().flat_map(|word| (*word as u64).to_le_bytes()));
    file.extend(notes);
    file.extend(info);
    file.resize(2 * 4096, 0);
    file.push(0b11_1111);
    file.resize(3 * 4096, 0);
    file.push(0b1_1111);
    file.resize(4 * 4096, 0);
    let mut at = file.len() + 24 * pages.len();
    for (flags, data) in &pages {
        file.extend((at as u64).to_le_bytes());
        file.extend([data.len() as u32, *flags, 0, 0].iter().flat_map(|word| word.to_le_bytes()));
        at += data.len();
    }
    file.extend(pages.iter().flat_map(|(_, data)| data));
    Ok(file)
}

/// The same as records, the last one first and the first one again.
fn flattened(file: &[u8]) -> Vec<u8> {
    let mut out = b"makedumpfile\0\0\0\0".to_vec();
    out.extend([1u64, 1].iter().flat_map(|word| word.to_be_bytes()));
    out.resize(4096, 0);
    let chunks: Vec<_> = file.chunks(4096).enumerate().collect();
    for (index, data) in chunks.iter().rev().chain(chunks.first()) {
        let place = [*index as u64 * 4096, data.len() as u64];
        out.extend(place.iter().flat_map(|word| word.to_be_bytes()));
        out.extend(*data);
    }
    out.extend([0xff; 16]);
    out
}

/// Flags, root, address; then tables of one entry a page, the last one a page of 4 KiB.
fn page_tables(five: bool) -> Vec<u8> {
    let at = 0xffff_8000_0000_0123u64;
    let levels = if five { 5 } else { 4 };
    let mut out = vec![u8::from(five)];
    out.extend(0u64.to_le_bytes());
    out.extend(at.to_le_bytes());
    let start = out.len();
    out.resize(start + levels * 4096 - 4096 + 8, 0);
    for level in 0..levels {
        // Index of the entry: that of `at` at the top levels, 0 below.
        let shift = 12 + 9 * (levels - 1 - level);
        let index = (at >> shift & 511) as usize;
        let place = start + level * 4096 + index * 8;
        out.resize(out.len().max(place + 8), 0);
        let next = if level + 1 < levels { (level as u64 + 1) << 12 | 7 } else { 0x1007 };
        out[place..place + 8].copy_from_slice(&next.to_le_bytes());
    }
    out
}

/// The mailbox of three calls, the first of which is done and the second under way.
fn mailbox() -> Outcome<Vec<u8>> {
    let call = payload::GuestCall::new(KERNEL, [1, 2, 3]);
    let image = payload::PayloadImage::new(KERNEL, &[call; 3], None)?;
    let mut mailbox = image.bytes[payload::MAILBOX as usize..][..0x200].to_vec();
    (mailbox[0x18], mailbox[0x1c], mailbox[0x40 + 0x40], mailbox[0x40 + 0x48 + 0x40]) =
        (1, 2, 2, 1);
    Ok(mailbox)
}

/// A stream of a q35 with 4 GiB: two pages in each part of RAM, one of them twice, one page of a device; vCPUs; CMOS.
fn migration_stream() -> Vec<u8> {
    let name = |name: &str| [&[name.len() as u8], name.as_bytes()].concat();
    let section = |kind: u8, id: u32, content: &[u8]| {
        [&[kind], &id.to_be_bytes()[..], content, &[0x7e], &id.to_be_bytes()].concat()
    };
    let first = |device: &str, instance: u32| {
        [name(device), instance.to_be_bytes().to_vec(), vec![0, 0, 0, 1]].concat()
    };
    let word = |word: u64| word.to_be_bytes().to_vec();
    let list = [
        [first("ram", 0), word(4 << 30 | 1 << 20 | 4)].concat(),
        [name("pc.ram"), word(4 << 30), name("vga"), word(1 << 20), word(0x10)].concat(),
    ];
    let page: Vec<u8> = b"a page ".iter().copied().cycle().take(4096).collect();
    let pages = [
        [word(0x1008), name("pc.ram"), page, word(0x2022), vec![0]].concat(),
        [word(0x8000_0022), vec![0], word(0x8000_1022), vec![7]].concat(),
        [word(2), name("vga"), vec![1], word(0x10)].concat(),
    ];
    let again = [word(0x2002), name("pc.ram"), vec![5], word(0x10)].concat();
    let cpu =
        |instance| [first("cpu", instance), vec![instance as u8 + 1; 16 * 8 + 8 + 6 * 12]].concat();
    let mut clock = [first("mc146818rtc", 0), vec![0; 128]].concat();
    let cmos = clock.len() - 128;
    (clock[cmos + 0x35], clock[cmos + 0x34], clock[cmos + 0x5c]) = (0x7f, 0, 0x80);
    let cpu_fields = r#"{"name":"env.regs","array_len":16,"size":8},{"name":"env.eip","size":8},{"name":"env.segs",
        "array_len":6,"struct":{"fields":[{"name":"selector","size":4},{"name":"base","size":8}]},"size":12}"#;
    let devices = [
        format!(r#"{{"name":"cpu","instance_id":0,"fields":[{cpu_fields}]}}"#),
        format!(r#"{{"name":"cpu","instance_id":1,"fields":[{cpu_fields}]}}"#),
        r#"{"name":"mc146818rtc","instance_id":0,"fields":[{"name":"cmos_data","size":128}]}"#
            .to_owned(),
    ];
    let json =
        format!(r#"{{"page_size":4096,"devices":[{}]}}"#, devices.join(",").replace('\n', ""));
    [
        b"QEVM\0\0\0\x03\x07\0\0\0\x0apc-q35-7.2".to_vec(),
        section(1, 2, &list.concat()),
        section(2, 2, &pages.concat()),
        section(3, 2, &again),
        section(4, 3, &cpu(0)),
        section(4, 4, &cpu(1)),
        section(4, 5, &clock),
        vec![0, 6],
        (json.len() as u32).to_be_bytes().to_vec(),
        json.into_bytes(),
    ]
    .concat()
}
