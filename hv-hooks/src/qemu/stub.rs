//! QEMU's gdb stub as a set of vCPUs: attaching to it, registers, stepping, running, memory. Knows which
//! packets QEMU's stub takes and when; knows no hooks.

use std::fmt::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use guest::{GuestPhys, Registers, Vcpu};

use super::rsp::{Rsp, StopReply, expect_ok, parse_hex_bytes, parse_hex_u64, parse_stop, push_hex};
use super::socket::Socket;
use super::target_xml::{RegisterFile, parse_includes};
use crate::Error;

/// More vCPUs than any QEMU machine has.
const MAX_VCPUS: usize = 8192;
/// Bytes written by one `M` packet: QEMU's stub takes packets of 4096 characters (`MAX_PACKET_LENGTH`).
const WRITE_CHUNK: usize = 1024;
/// `M` packets sent in one write; their answers are short.
const WRITE_BATCH: usize = 16;
/// vCPUs whose registers are asked for in one write; each answers with some 1,200 characters.
const LEARN_BATCH: usize = 32;
/// Longest target description or output of a monitor command.
const MAX_TEXT: usize = 1 << 20;

/// The stub, and the state of the machine as the stub sees it.
pub(crate) struct Stub {
    rsp: Rsp,
    /// gdb's thread number of each vCPU.
    threads: Vec<u64>,
    file: RegisterFile,
    running: bool,
    /// Registers read or written since the machine stands.
    known: Vec<Option<Registers>>,
    limit: Duration,
}

impl Stub {
    /// Connects, which pauses the machine. Breakpoints that a former client left behind are removed.
    pub(crate) fn connect(endpoint: &Path, limit: Duration) -> Result<Self, Error> {
        let mut rsp = Rsp::new(Socket::connect(endpoint)?, limit);
        greet(&mut rsp, limit)?;
        let threads = thread_ids(&mut rsp)?;
        // The stub answers `P` only after its description was read (gdbstub.c, gdb_has_xml).
        let target = description(&mut rsp, "target.xml")?;
        let features: Vec<String> = parse_includes(&target)
            .iter()
            .map(|name| description(&mut rsp, name))
            .collect::<Result<_, Error>>()?;
        let file = RegisterFile::parse(&features)?;
        let known = vec![None; threads.len()];
        Ok(Self { rsp, threads, file, running: false, known, limit })
    }

    /// Number of vCPUs.
    pub(crate) fn vcpu_count(&self) -> usize {
        self.threads.len()
    }

    /// Whether the machine runs. It does until its stop has been received.
    pub(crate) fn running(&self) -> bool {
        self.running
    }

    /// Somebody else let the machine run.
    pub(crate) fn set_running(&mut self) {
        self.running = true;
        self.known.fill(None);
    }

    /// The vCPU of a thread of gdb's.
    pub(crate) fn vcpu_of(&self, thread: u64) -> Option<Vcpu> {
        self.threads.iter().position(|&known| known == thread).map(Vcpu)
    }

    fn thread(&self, vcpu: Vcpu) -> Result<u64, Error> {
        self.threads.get(vcpu.0).copied().ok_or(Error::NoSuchVcpu(vcpu))
    }

    fn must_stand(&self, what: &'static str) -> Result<(), Error> {
        if self.running { Err(Error::Running(what)) } else { Ok(()) }
    }

    /// Registers of a vCPU.
    pub(crate) fn registers(&mut self, vcpu: Vcpu) -> Result<Registers, Error> {
        self.registers_after(vcpu, &[])
    }

    /// Registers of a vCPU, after packets that are answered `OK`: one round trip for all.
    pub(crate) fn registers_after(
        &mut self,
        vcpu: Vcpu,
        first: &[&str],
    ) -> Result<Registers, Error> {
        self.must_stand("reading registers")?;
        let select = format!("Hg{:x}", self.thread(vcpu)?);
        if let Some(Some(known)) = self.known.get(vcpu.0).copied() {
            self.rsp.order(first)?;
            return Ok(known);
        }
        let packets = [first, &[&select, "g"]].concat();
        let mut answers = self.rsp.exchange(&packets)?;
        let all = answers.pop().unwrap_or_default();
        expect_ok(&packets, &answers)?;
        let regs = self.file.decode(&all)?;
        self.remember(vcpu, regs);
        Ok(regs)
    }

    /// Reads the registers of all vCPUs that are not known yet, in one round trip: each is a wait for QEMU's main
    /// loop.
    pub(crate) fn learn_registers(&mut self) -> Result<(), Error> {
        self.must_stand("reading registers")?;
        let unknown = self.known.iter().enumerate().filter(|(_, known)| known.is_none());
        let unknown: Vec<Vcpu> = unknown.map(|(index, _)| Vcpu(index)).collect();
        for some in unknown.chunks(LEARN_BATCH) {
            let mut packets = Vec::with_capacity(2 * some.len());
            for &vcpu in some {
                packets.extend([format!("Hg{:x}", self.thread(vcpu)?), "g".to_owned()]);
            }
            let packets: Vec<&str> = packets.iter().map(String::as_str).collect();
            let answers = self.rsp.exchange(&packets)?;
            for ((&vcpu, sent), said) in some.iter().zip(packets.chunks(2)).zip(answers.chunks(2)) {
                let (Some(selected), Some(all)) = (said.first(), said.get(1)) else { break };
                expect_ok(sent, std::slice::from_ref(selected))?;
                let regs = self.file.decode(all)?;
                self.remember(vcpu, regs);
            }
        }
        Ok(())
    }

    fn remember(&mut self, vcpu: Vcpu, regs: Registers) {
        if let Some(slot) = self.known.get_mut(vcpu.0) {
            *slot = Some(regs);
        }
    }

    /// The packets that set the registers which `regs` knows and the vCPU does not hold already.
    pub(crate) fn register_writes(
        &mut self,
        vcpu: Vcpu,
        regs: &Registers,
    ) -> Result<Vec<String>, Error> {
        let mut current = self.registers(vcpu)?;
        let mut packets = self.file.writes(regs, &current)?;
        if !packets.is_empty() {
            packets.insert(0, format!("Hg{:x}", self.thread(vcpu)?));
        }
        current.overlay(regs);
        self.remember(vcpu, current);
        Ok(packets)
    }

    /// Sets registers. After a failure some may be set and others not.
    pub(crate) fn set_registers(&mut self, vcpu: Vcpu, regs: &Registers) -> Result<(), Error> {
        self.must_stand("setting registers")?;
        let packets = self.register_writes(vcpu, regs)?;
        let sent = self.order(&packets);
        if sent.is_err() {
            self.known.fill(None);
        }
        sent
    }

    /// Sends packets that are to be answered `OK`, in one write.
    pub(crate) fn order(&mut self, packets: &[String]) -> Result<(), Error> {
        self.must_stand("ordering the gdb stub")?;
        if packets.is_empty() {
            return Ok(());
        }
        let packets: Vec<&str> = packets.iter().map(String::as_str).collect();
        self.rsp.order(&packets)
    }

    /// Lets all vCPUs run but those `held`, after packets that are answered `OK`: all in one write.
    pub(crate) fn run(&mut self, first: &[String], held: &[Vcpu]) -> Result<(), Error> {
        self.must_stand("resuming")?;
        let mut action = String::from("vCont");
        if held.is_empty() {
            action.push_str(";c");
        } else {
            for (index, thread) in self.threads.iter().enumerate() {
                if !held.contains(&Vcpu(index)) {
                    let _ = write!(action, ";c:{thread:x}");
                }
            }
        }
        self.start(first, &action)
    }

    /// Lets one vCPU execute one instruction, the others stand, and waits for it. Interrupts are held off
    /// (the stub's default, SSTEP_NOIRQ).
    pub(crate) fn step(&mut self, first: &[String], vcpu: Vcpu) -> Result<(), Error> {
        let action = format!("vCont;s:{:x}", self.thread(vcpu)?);
        self.start(first, &action)?;
        let after = self.limit;
        match self.receive_stop(Instant::now() + after)? {
            Some(_) => Ok(()),
            None => Err(Error::Timeout { what: "a single step", after }),
        }
    }

    fn start(&mut self, first: &[String], action: &str) -> Result<(), Error> {
        let mut packets: Vec<&str> = first.iter().map(String::as_str).collect();
        packets.push(action);
        self.rsp.send(&packets)?;
        self.running = true;
        self.known.fill(None);
        packets.pop();
        let answers = self.rsp.answers(packets.len())?;
        expect_ok(&packets, &answers)
    }

    /// A stop that has been reported, and when it was read; `None` when none was before the deadline.
    pub(crate) fn receive_stop(
        &mut self,
        deadline: Instant,
    ) -> Result<Option<(StopReply, Instant)>, Error> {
        match self.rsp.receive(deadline)? {
            Some(packet) => self.stopped(&packet).map(Some),
            None => Ok(None),
        }
    }

    /// A stop that is already there.
    pub(crate) fn receive_stop_ready(&mut self) -> Result<Option<(StopReply, Instant)>, Error> {
        match self.rsp.receive_ready()? {
            Some(packet) => self.stopped(&packet).map(Some),
            None => Ok(None),
        }
    }

    fn stopped(&mut self, packet: &[u8]) -> Result<(StopReply, Instant), Error> {
        let at = Instant::now();
        let reply = parse_stop(packet)?;
        self.running = false;
        self.known.fill(None);
        Ok((reply, at))
    }

    /// Stops a running machine and returns the stop that is reported, which may be another one.
    pub(crate) fn interrupt(&mut self) -> Result<(StopReply, Instant), Error> {
        self.rsp.interrupt()?;
        let after = self.limit;
        self.receive_stop(Instant::now() + after)?.ok_or(Error::Timeout { what: "stopping", after })
    }

    /// Writes guest-physical memory the way QEMU does it itself, so that translated code is dropped.
    pub(crate) fn write_memory(&mut self, at: GuestPhys, bytes: &[u8]) -> Result<(), Error> {
        let mut packets = vec![String::from("Qqemu.PhyMemMode:1")];
        for (index, chunk) in bytes.chunks(WRITE_CHUNK).enumerate() {
            let to = at + (index * WRITE_CHUNK) as u64;
            let mut packet = format!("M{:x},{:x}:", to.0, chunk.len());
            push_hex(&mut packet, chunk);
            packets.push(packet);
            if packets.len() >= WRITE_BATCH {
                self.physical_batch(&mut packets)?;
            }
        }
        self.physical_batch(&mut packets)
    }

    /// Sends a batch in physical mode and leaves that mode whatever happens: with it on, breakpoints and
    /// virtual reads of the stub would mean something else.
    fn physical_batch(&mut self, packets: &mut Vec<String>) -> Result<(), Error> {
        packets.push("Qqemu.PhyMemMode:0".into());
        let result = self.order(packets);
        packets.truncate(1);
        result
    }

    /// Runs commands of the human monitor, sent in one write, and returns what each prints. Failures are text
    /// like any other. While the machine stands this is ten times as fast as by QMP, which goes through an
    /// I/O thread for each command: 0.04 ms against 0.5 ms.
    pub(crate) fn monitor(&mut self, lines: &[String]) -> Result<Vec<String>, Error> {
        self.must_stand("running a monitor command")?;
        let mut packets = Vec::with_capacity(lines.len());
        for line in lines {
            let mut packet = String::from("qRcmd,");
            push_hex(&mut packet, line.as_bytes());
            packets.push(packet);
        }
        let packets: Vec<&str> = packets.iter().map(String::as_str).collect();
        self.rsp.send(&packets)?;
        lines.iter().map(|line| self.monitor_output(line)).collect()
    }

    /// Reads the output of one command: `O` packets with text in hex, then `OK`.
    fn monitor_output(&mut self, line: &str) -> Result<String, Error> {
        let mut text = Vec::new();
        while text.len() < MAX_TEXT {
            let answer = self.rsp.answers(1)?.pop().unwrap_or_default();
            match answer.split_first() {
                Some((b'O', b"K")) => return Ok(String::from_utf8_lossy(&text).into_owned()),
                Some((b'O', digits)) => text.extend(parse_hex_bytes(digits)?),
                _ => return Err(Error::answer(format!("monitor command {line}"), &answer)),
            }
        }
        Err(Error::answer(format!("monitor command {line}"), b"endless"))
    }

    /// Removes all breakpoints, lets the machine run and ends the session.
    pub(crate) fn detach(&mut self) -> Result<(), Error> {
        self.must_stand("detaching")?;
        self.rsp.order(&["D"])
    }
}

impl AsFd for Stub {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.rsp.as_fd()
    }
}

/// The first exchange. Connecting pauses the machine, which the stub reports by a stop reply that nobody asked
/// for, or not at all if the machine stood already. `?` makes QEMU remove all breakpoints. What comes before
/// the answer to `qSupported` is dropped.
fn greet(rsp: &mut Rsp, limit: Duration) -> Result<(), Error> {
    let deadline = Instant::now() + limit;
    rsp.send(&["?", "qSupported:hwbreak+"])?;
    for _ in 0..16 {
        match rsp.receive(deadline)? {
            Some(packet) if packet.starts_with(b"PacketSize=") => return Ok(()),
            Some(_) => {}
            None => {
                return Err(Error::Timeout {
                    what: "the first answer of the gdb stub",
                    after: limit,
                });
            }
        }
    }
    Err(Error::answer("gdb packet qSupported", b"no PacketSize"))
}

/// gdb's thread numbers, in the order of the vCPUs.
fn thread_ids(rsp: &mut Rsp) -> Result<Vec<u64>, Error> {
    let mut threads = Vec::new();
    let mut answer = rsp.ask("qfThreadInfo")?;
    while let Some(list) = answer.strip_prefix(b"m") {
        for id in list.split(|&byte| byte == b',') {
            threads.push(parse_hex_u64(id)?);
        }
        if threads.len() > MAX_VCPUS {
            return Err(Error::answer("gdb packet qsThreadInfo", b"endless"));
        }
        answer = rsp.ask("qsThreadInfo")?;
    }
    Ok(threads)
}

/// One file of the target description.
fn description(rsp: &mut Rsp, name: &str) -> Result<String, Error> {
    let mut text = Vec::new();
    while text.len() < MAX_TEXT {
        let ask = format!("qXfer:features:read:{name}:{:x},ff0", text.len());
        let answer = rsp.ask(&ask)?;
        match answer.split_first() {
            Some((b'l', rest)) => {
                text.extend_from_slice(rest);
                return Ok(String::from_utf8_lossy(&text).into_owned());
            }
            Some((b'm', rest)) if !rest.is_empty() => text.extend_from_slice(rest),
            _ => return Err(Error::answer(ask, &answer)),
        }
    }
    Err(Error::answer(format!("qXfer {name}"), b"endless"))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write as _};
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    use guest::Reg;

    use super::super::rsp::{decode, encode};
    use super::*;

    const LIMIT: Duration = Duration::from_secs(2);

    /// A stub of one vCPU that answers by the first rule whose start fits; ends with its client.
    fn serve(rules: Vec<(&'static str, String)>) -> (tempfile::TempDir, JoinHandle<Vec<String>>) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("gdb")).unwrap();
        let server = std::thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            client.write_all(&encode(b"T02thread:01;")).unwrap();
            let (mut buffer, mut got) = (Vec::new(), Vec::new());
            let mut chunk = [0; 4096];
            while let Ok(len @ 1..) = client.read(&mut chunk) {
                buffer.extend_from_slice(&chunk[..len]);
                while let Ok(Some(packet)) = decode(&mut buffer) {
                    let packet = String::from_utf8(packet).unwrap();
                    if let Some((_, answer)) =
                        rules.iter().find(|(start, _)| packet.starts_with(start))
                    {
                        let _ = client.write_all(&encode(answer.as_bytes()));
                    }
                    got.push(packet);
                }
            }
            got
        });
        (dir, server)
    }

    /// Rules of a well-behaved stub. All registers are 64 bits, and the first is 1, the second 2...
    fn rules() -> Vec<(&'static str, String)> {
        let names = Reg::ALL.iter().map(|reg| match reg {
            Reg::Rflags => "eflags",
            Reg::KernelGsBase => "k_gs_base",
            other => other.name(),
        });
        let described: String =
            names.map(|name| format!("<reg name=\"{name}\" bitsize=\"64\"/>")).collect();
        let mut values = String::new();
        for index in 1..=Reg::ALL.len() as u64 {
            push_hex(&mut values, &index.to_le_bytes());
        }
        vec![
            ("?", "T05thread:01;".into()),
            ("qSupported", "PacketSize=1000".into()),
            ("qfThreadInfo", "m01".into()),
            ("qsThreadInfo", "l".into()),
            ("qXfer:features:read:target.xml", "l<xi:include href=\"core.xml\"/>".into()),
            ("qXfer:features:read:core.xml", format!("l{described}")),
            ("qXfer", "E00".into()),
            ("g", values),
            ("M", "E14".into()),
            ("vCont;c", "T05thread:01;".into()),
            ("", "OK".into()),
        ]
    }

    #[test]
    fn a_session() {
        let (dir, server) = serve(rules());
        let mut stub = Stub::connect(&dir.path().join("gdb"), LIMIT).unwrap();
        assert_eq!((stub.vcpu_count(), stub.running()), (1, false));
        let regs = stub.registers(Vcpu(0)).unwrap();
        let count = Reg::ALL.len() as u64;
        assert_eq!((regs.get(Reg::Rax), regs.get(Reg::TrBase)), (Some(1), Some(count)));
        stub.set_registers(Vcpu(0), &regs.with(Reg::Rcx, 0x11)).unwrap();
        assert_eq!(stub.registers(Vcpu(0)).unwrap().get(Reg::Rcx), Some(0x11));
        assert!(matches!(stub.registers(Vcpu(1)), Err(Error::NoSuchVcpu(Vcpu(1)))));
        stub.run(&["Z1,10,1".into()], &[]).unwrap();
        // Nothing may be sent to a guest that runs.
        assert!(matches!(stub.registers(Vcpu(0)), Err(Error::Running(_))));
        let (reply, _) = stub.receive_stop(Instant::now() + LIMIT).unwrap().unwrap();
        assert_eq!(reply, StopReply::Signal { signal: 5, thread: Some(1) });
        drop(stub);
        let got = server.join().unwrap();
        assert_eq!(got.iter().filter(|packet| *packet == "g").count(), 1, "{got:?}");
        let writes: Vec<&String> = got.iter().filter(|packet| packet.starts_with('P')).collect();
        assert_eq!(writes, ["P1=1100000000000000"]);
    }

    #[test]
    fn a_failed_write_leaves_physical_mode() {
        let (dir, server) = serve(rules());
        let mut stub = Stub::connect(&dir.path().join("gdb"), LIMIT).unwrap();
        assert!(matches!(stub.write_memory(GuestPhys(0), &[1; 3000]), Err(Error::Answer { .. })));
        drop(stub);
        assert_eq!(server.join().unwrap().last().unwrap(), "Qqemu.PhyMemMode:0");
    }

    #[test]
    fn stubs_without_a_description_are_refused() {
        let mut few = rules();
        few.retain(|(start, _)| !start.contains("core.xml"));
        let (dir, _server) = serve(few);
        assert!(matches!(Stub::connect(&dir.path().join("gdb"), LIMIT), Err(Error::Answer { .. })));
    }
}
