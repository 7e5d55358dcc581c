//! Writes migration streams for tests, with numbers and layouts of its own: the readers' constants are not used, so
//! that a wrong one shows.

/// A page of RAM as it is sent.
#[derive(Clone, Copy, Debug)]
pub(in crate::dump) enum Sent<'a> {
    Page(&'a [u8]),
    Fill(u8),
    /// As a difference to an earlier copy.
    Difference(&'a [u8]),
    Zlib(&'a [u8]),
}

/// A stream that is being written.
#[derive(Clone)]
pub(in crate::dump) struct StreamFile {
    pub bytes: Vec<u8>,
    described: Vec<String>,
    sections: u32,
    last_block: Option<String>,
}

/// The section number of RAM.
const RAM: u32 = 2;

fn name(out: &mut Vec<u8>, name: &str) {
    out.push(name.len() as u8);
    out.extend(name.as_bytes());
}

impl StreamFile {
    pub(in crate::dump) fn new(machine: &str, capabilities: &[&str]) -> Self {
        let mut bytes = b"QEVM\0\0\0\x03".to_vec();
        bytes.push(7);
        bytes.extend((machine.len() as u32).to_be_bytes());
        bytes.extend(machine.as_bytes());
        if !capabilities.is_empty() {
            bytes.push(5);
            name(&mut bytes, "configuration/capabilities");
            bytes.extend(1u32.to_be_bytes());
            bytes.extend((capabilities.len() as u32).to_be_bytes());
            capabilities.iter().for_each(|it| name(&mut bytes, it));
        }
        Self { bytes, described: Vec::new(), sections: 10, last_block: None }
    }

    /// The section with the list of blocks. `shared`: with an address of each.
    pub(in crate::dump) fn blocks(&mut self, blocks: &[(&str, u64)], shared: bool) {
        self.bytes.push(1);
        self.bytes.extend(RAM.to_be_bytes());
        name(&mut self.bytes, "ram");
        self.bytes.extend([0, 0, 0, 0, 0, 0, 0, 4]);
        let total: u64 = blocks.iter().fold(0, |sum, (_, size)| sum.wrapping_add(*size));
        self.bytes.extend((total | 4).to_be_bytes());
        for (block, size) in blocks {
            name(&mut self.bytes, block);
            self.bytes.extend(size.to_be_bytes());
            if shared {
                self.bytes.extend([0x77; 8]);
            }
        }
        self.end_of_ram();
    }

    /// A section of pages, each of a block and at an offset in it.
    pub(in crate::dump) fn pages(&mut self, pages: &[(&str, u64, Sent<'_>)]) {
        self.bytes.push(2);
        self.bytes.extend(RAM.to_be_bytes());
        for (block, at, sent) in pages {
            let same = self.last_block.as_deref() == Some(block);
            let flag = match sent {
                Sent::Fill(_) => 2,
                Sent::Page(_) => 8,
                Sent::Difference(_) => 0x40,
                Sent::Zlib(_) => 0x100,
            };
            let word = at | flag | if same { 0x20 } else { 0 };
            self.bytes.extend(word.to_be_bytes());
            if !same {
                name(&mut self.bytes, block);
                self.last_block = Some((*block).to_owned());
            }
            match sent {
                Sent::Fill(byte) => self.bytes.push(*byte),
                Sent::Page(page) => self.bytes.extend(*page),
                Sent::Difference(data) => {
                    self.bytes.push(1);
                    self.bytes.extend((data.len() as u16).to_be_bytes());
                    self.bytes.extend(*data);
                }
                Sent::Zlib(data) => {
                    self.bytes.extend((data.len() as u32).to_be_bytes());
                    self.bytes.extend(*data);
                }
            }
        }
        self.end_of_ram();
    }

    fn end_of_ram(&mut self) {
        self.bytes.extend(0x10u64.to_be_bytes());
        self.bytes.push(0x7e);
        self.bytes.extend(RAM.to_be_bytes());
    }

    /// A device's section with its fields as JSON, and their bytes; `None` leaves it out of the description.
    pub(in crate::dump) fn device(
        &mut self,
        device: &str,
        instance: u32,
        fields: Option<&str>,
        content: &[u8],
    ) {
        self.bytes.push(4);
        self.bytes.extend(self.sections.to_be_bytes());
        name(&mut self.bytes, device);
        self.bytes.extend(instance.to_be_bytes());
        self.bytes.extend([0, 0, 0, 1]);
        self.bytes.extend(content);
        self.bytes.push(0x7e);
        self.bytes.extend(self.sections.to_be_bytes());
        self.sections += 1;
        self.described.extend(fields.map(|fields| {
            format!(r#"{{"name": "{device}", "instance_id": {instance}, "version": 1, "fields": [{fields}]}}"#)
        }));
    }

    /// A vCPU with its members in another order than any QEMU has them in.
    pub(in crate::dump) fn cpu(&mut self, instance: u32, rip: u64, cr3: u64, cs: u32) {
        let fields = r#"{"name": "other", "size": 3}, {"name": "env.cr[3]", "size": 8}, {"name": "env.segs",
            "array_len": 6, "struct": {"fields": [{"name": "base", "size": 8}, {"name": "selector", "size": 4}]},
            "size": 12}, {"name": "env.eip", "size": 8}, {"name": "env.regs", "array_len": 16, "size": 8}"#;
        let mut content = vec![9; 3];
        content.extend(cr3.to_be_bytes());
        for segment in 0..6u64 {
            content.extend((0x5000 + segment).to_be_bytes());
            content.extend((cs + segment as u32 - 1).to_be_bytes());
        }
        content.extend(rip.to_be_bytes());
        (0..16u64).for_each(|reg| content.extend((0x600 + reg).to_be_bytes()));
        self.device("cpu", instance, Some(fields), &content);
    }

    /// The clock chip, with RAM below and above 4 GiB in units of 64 KiB, the former from 16 MiB on.
    pub(in crate::dump) fn clock(&mut self, below: u16, above: u32) {
        let mut content = vec![0; 7 + 128];
        content[7 + 0x34..7 + 0x36].copy_from_slice(&below.to_le_bytes());
        content[7 + 0x5b..7 + 0x5e].copy_from_slice(&above.to_le_bytes()[..3]);
        let fields = r#"{"name": "other", "size": 7}, {"name": "cmos_data", "size": 128}"#;
        self.device("mc146818rtc", 0, Some(fields), &content);
    }

    /// The whole stream, with a description of its devices or without.
    pub(in crate::dump) fn finish(mut self, described: bool) -> Vec<u8> {
        self.bytes.push(0);
        if described {
            let json = format!(
                r#"{{"configuration": {{}}, "page_size": 4096, "devices": [{}]}}"#,
                self.described.join(", ").replace('\n', "")
            );
            self.bytes.push(6);
            self.bytes.extend((json.len() as u32).to_be_bytes());
            self.bytes.extend(json.as_bytes());
        }
        self.bytes
    }
}

/// libvirt's header and a domain's XML before a stream.
pub(in crate::dump) fn saved(magic: &[u8; 16], format: u32, stream: &[u8]) -> Vec<u8> {
    let xml = b"<domain type='kvm'><name>guest</name></domain>\n\0";
    let mut file = magic.to_vec();
    for word in [2, xml.len() as u32, 0, format, 0] {
        file.extend(word.to_le_bytes());
    }
    file.resize(92, 0);
    [&file[..], xml, stream].concat()
}
