//! Calling functions of the guest's kernel from memory that the guest does not know: fresh memory
//! is added, mapped, loaded, run and taken away again. What is loaded and mapped is
//! `repair_image::payload`'s.

use std::time::Duration;

use guest::{CallOutcome, FreshKind, FreshRegion, GuestVirt, MachineError, Reg, Vcpu};
use repair_image::payload::{self, CallResult, EntryWrite, PayloadImage, PayloadMapping};

use crate::Error;
use crate::action::Action;
use crate::apply::Hand;
use crate::journal::Deed;
use crate::reserved;

/// EFER.NXE: the no-execute bit of page-table entries means something (Intel SDM 3A 2.2.1).
const EFER_NXE: u64 = 1 << 11;

/// One call.
#[derive(Clone, Debug)]
pub(crate) struct GuestCall {
    pub(crate) function: String,
    pub(crate) at: GuestVirt,
    pub(crate) arguments: [u64; 6],
    pub(crate) why: String,
}

impl GuestCall {
    /// The call that an action makes, if it makes one.
    pub(crate) fn of(action: &Action) -> Option<Self> {
        match action {
            Action::CallGuest { function, at, arguments, why, .. } => {
                let mut all = [0; 6];
                all.iter_mut().zip(arguments).for_each(|(slot, argument)| *slot = *argument);
                Some(Self { function: function.clone(), at: *at, arguments: all, why: why.clone() })
            }
            _ => None,
        }
    }
}

/// What became of a series of calls.
#[derive(Debug, Default)]
pub(crate) struct Called {
    /// Functions that returned, with their results in hex.
    pub(crate) returned: Vec<(String, String)>,
    /// Function that was begun and has not returned.
    pub(crate) begun: Option<String>,
}

/// Makes the calls one after another on `vcpu`, whose preempt count is at `preempt_count`. What was
/// called is told in `called` in any case. Afterwards the fresh memory is gone and the vCPU stands
/// at the payload's end.
pub(crate) fn run(
    hand: &mut Hand<'_>,
    vcpu: Vcpu,
    preempt_count: Option<GuestVirt>,
    calls: &[GuestCall],
    limit: Duration,
    called: &mut Called,
) -> Result<(), Error> {
    let region = add(hand)?;
    let mapping = plan_mapping(hand, vcpu, region)?;
    let list: Vec<payload::GuestCall> = calls
        .iter()
        .map(|call| payload::GuestCall { function: call.at, arguments: call.arguments })
        .collect();
    let image = PayloadImage::new(mapping.base, &list, preempt_count).map_err(Error::payload)?;
    load(hand, region, &image, &mapping)?;
    link(hand, &mapping.link, "map the fresh memory")?;
    let outcome = execute(hand, vcpu, &image, limit);
    let done = collect(hand, region, calls, called)?;
    match outcome? {
        CallOutcome::Crashed(_) => Err(Error::CalleeCrashed {
            function: called.begun.clone().unwrap_or_else(|| "the payload".to_owned()),
        }),
        CallOutcome::Reached(_) if done < calls.len() => {
            Err(Error::CallsUnfinished { done, wanted: calls.len() })
        }
        CallOutcome::Reached(_) => {
            // The translation may live on in this vCPU's TLB until it next loads CR3 (a task
            // switch). The slot is at the far end of the module area, which is filled from the
            // other end.
            let EntryWrite { at, old, new } = mapping.link;
            let back = EntryWrite { at, old: new, new: old };
            link(hand, &back, "unmap the fresh memory")?;
            remove(hand, region)
        }
    }
}

fn add(hand: &mut Hand<'_>) -> Result<FreshRegion, Error> {
    let fresh = hand
        .machine
        .fresh_memory()
        .ok_or(Error::NoAbility { ability: "give the guest fresh memory" })?;
    let region = fresh.add(payload::REGION_SIZE).map_err(Error::machine("adding fresh memory"))?;
    hand.journal.push(Deed::FreshAdded { region }, "room for the payload");
    if region.kind == FreshKind::FirmwareTail {
        let space = hand.image.placement.space(hand.machine.phys());
        if reserved::holds(hand.image, &space, region) == Some(false) {
            return Err(Error::NotReserved { at: region.at, size: region.size });
        }
    }
    if region.size < payload::REGION_SIZE {
        return Err(Error::FreshTooSmall { found: region.size, needed: payload::REGION_SIZE });
    }
    Ok(region)
}

fn remove(hand: &mut Hand<'_>, region: FreshRegion) -> Result<(), Error> {
    let fresh =
        hand.machine.fresh_memory().ok_or(Error::NoAbility { ability: "remove fresh memory" })?;
    fresh.remove(region).map_err(Error::machine("removing fresh memory"))?;
    hand.journal.push(Deed::FreshRemoved { region }, "the payload is done");
    Ok(())
}

fn plan_mapping(
    hand: &mut Hand<'_>,
    vcpu: Vcpu,
    region: FreshRegion,
) -> Result<PayloadMapping, Error> {
    let registers = hand.machine.registers(vcpu).map_err(Error::machine("reading registers"))?;
    let no_execute = registers.get(Reg::Efer).is_some_and(|efer| efer & EFER_NXE != 0);
    let space = hand.image.placement.space(hand.machine.phys());
    PayloadMapping::plan(&space, region.at, no_execute).map_err(Error::payload)
}

/// Fills the region: first its bytes, then the page table in it.
fn load(
    hand: &mut Hand<'_>,
    region: FreshRegion,
    image: &PayloadImage,
    mapping: &PayloadMapping,
) -> Result<(), Error> {
    let writer =
        hand.machine.writer().ok_or(Error::NoAbility { ability: "write to guest memory" })?;
    // Under TCG writing code costs more than writing data.
    let (code, data) = image.code_and_data();
    writer.write_code(region.at, code).map_err(Error::machine("loading the payload"))?;
    writer
        .write(region.at + code.len() as u64, data)
        .map_err(|source| Error::memory("fresh memory", source))?;
    for entry in &mapping.table {
        writer
            .write(entry.at, &entry.new.to_le_bytes())
            .map_err(|source| Error::memory("fresh memory", source))?;
    }
    hand.journal.push(Deed::Loaded { phys: region.at, bytes: image.bytes.len() }, "the payload");
    Ok(())
}

/// Writes the entry of the kernel's own page tables.
fn link(hand: &mut Hand<'_>, entry: &EntryWrite, why: &str) -> Result<(), Error> {
    let found = hand
        .machine
        .phys()
        .read_u64(entry.at)
        .map_err(|source| Error::memory("a page table", source))?;
    if found != entry.old {
        return Err(Error::TableChanged { at: entry.at, found, expected: entry.old });
    }
    hand.write_phys(entry.at, None, &entry.new.to_le_bytes(), false, why)
}

fn execute(
    hand: &mut Hand<'_>,
    vcpu: Vcpu,
    image: &PayloadImage,
    limit: Duration,
) -> Result<CallOutcome, Error> {
    let old = hand.machine.registers(vcpu).map_err(Error::machine("reading registers"))?;
    let caller = hand
        .machine
        .caller()
        .ok_or(Error::NoAbility { ability: "run guest code under control" })?;
    let deed = Deed::Registers { vcpu, old: Box::new(old), new: Box::new(image.entry) };
    hand.journal.push(deed, "run the payload");
    caller
        .run_until(vcpu, &image.entry, image.finish, limit)
        .map_err(|source: MachineError| Error::Machine { what: "calling guest functions", source })
}

/// Reads the mailbox; the number of calls that returned.
fn collect(
    hand: &mut Hand<'_>,
    region: FreshRegion,
    calls: &[GuestCall],
    called: &mut Called,
) -> Result<usize, Error> {
    let mut bytes = vec![0; usize::try_from(payload::REGION_SIZE).unwrap_or(0)];
    hand.machine
        .phys()
        .read(region.at, &mut bytes)
        .map_err(|source| Error::memory("the mailbox", source))?;
    let Some(results) = payload::results(&bytes) else {
        // Nothing may be concluded: as if the first function had been begun.
        called.begun = calls.first().map(|call| call.function.clone());
        return Err(Error::MailboxDamaged);
    };
    let mut done = 0;
    for (call, result) in calls.iter().zip(results) {
        match result {
            CallResult::NotBegun => {}
            CallResult::Begun => called.begun = Some(call.function.clone()),
            CallResult::Returned(value) => {
                done += 1;
                let result = format!("{value:#x}");
                let deed = Deed::Called { function: call.function.clone(), result: result.clone() };
                hand.journal.push(deed, &call.why);
                called.returned.push((call.function.clone(), result));
            }
        }
    }
    Ok(done)
}
