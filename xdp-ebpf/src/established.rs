//! The established table: an array in which a key has four places, and a kernel hash behind it for keys that have found none of
//! theirs free.
//!
//! Readers take no lock, nor do writers. A slot is claimed and published by its last key word, and freed by it. What changes while a
//! flow goes on is written in place, so that entries stay where they are: what packets change, and the next hop, during which the
//! routing tag is nobody's. A reader that has seen the tag before it was taken away can send one packet to a mixture of the old next
//! hop and the new; a processor that reorders reads can when it sees the new tag too, because a comparison alone orders none.
//!
//! Who looks at a slot, or writes to it, that is freed and claimed meanwhile can meet another flow's entry, as with every preallocated
//! hash of the kernel. The worst of it: a next hop that is being renewed lands in the entry of the slot's next key, which goes that way
//! until its tag's time is over.

use core::{arch::asm, mem::offset_of, ptr::null_mut};

use aya_ebpf::bindings::BPF_ANY;
use xdp_common::{
    net::{Address, FlowKey, Ip6},
    select,
    tables::{CLAIMED, Config, FREE, Flow, PLACES, Slot},
};

use crate::{
    CONFIG,
    atomic::{after, again, exchange, exchange_if, opaque},
    family::Maps,
};

/// Routing tag of an entry whose next hop is being written. Like every number it is a tag by chance only.
const WRITING: u64 = 0x7772_6974;
/// The bits of the tag in the word that it shares with the clock of the last packet.
const TAG: u64 = u32::MAX as u64;

/// 1 where processors keep reads in their order, as those of x86_64 do; set by the agent when it loads the programs. The verifier knows
/// the value, and leaves out what is not needed then.
#[unsafe(no_mangle)]
static READS_IN_ORDER: u32 = 0;

/// The flow of a packet, null when there is none: looked for where most are, and elsewhere by a call. The packet lies in its place, and
/// is of a protocol with ports: its last key word is not that of a slot which holds nothing.
#[inline(always)] // the established path
pub(crate) fn find_at_home<F: Maps>(config: &Config, key: &FlowKey<F::Addr>) -> *mut Flow<F::Addr> {
    let home = if is_wide::<F::Addr>() {
        let [a, b, c, d, end] = wide(key);
        select::home_of(Ip6::fold(a, b), Ip6::fold(c, d), end, config.established_homes)
    } else {
        select::home(key, config.established_homes)
    };
    let Some(slot) = F::established().get_ptr_mut(home) else { return null_mut() };
    fetch_end(slot);
    match flow_in::<F>(slot, again(key), |one, other| {
        if is_wide::<F::Addr>() { differs_widely(one, other) } else { differs(one, other) }
    }) {
        Some(flow) => flow,
        None => find::<F>(key),
    }
}

/// Whether keys are read by words of 64 bits: those of IPv6, where the packet at hand and the slots lie at multiples of eight bytes.
/// Keys of IPv4 are written by half as much, and who reads both halves at once waits until they have left the CPU.
#[inline(always)] // a constant
const fn is_wide<A: Address>() -> bool {
    A::LEN == 16
}

/// The words of a key of IPv6 in a map.
#[inline(always)] // loads
fn wide<A: Address>(key: &FlowKey<A>) -> [u64; 5] {
    const { assert!(!is_wide::<A>() || size_of::<FlowKey<A>>() == 40) };
    // SAFETY: as asserted; values of maps begin at multiples of eight bytes, and packets and slots begin with their key.
    unsafe { (&raw const *key).cast::<[u64; 5]>().read() }
}

/// [`differs`] by those words.
#[inline(always)] // the established path
fn differs_widely<A: Address>(one: &FlowKey<A>, other: &FlowKey<A>) -> usize {
    let ([a, b, c, d, e], [f, g, h, i, j]) = (wide(one), wide(other));
    opaque(((a ^ f) | (b ^ g) | (c ^ h) | (d ^ i) | (e ^ j)) as usize)
}

/// The flow of a key, null when there is none.
#[inline(never)] // looked at from many places; the verifier follows each inlined copy with all that surrounds it
pub(crate) fn find<F: Maps>(key: &FlowKey<F::Addr>) -> *mut Flow<F::Addr> {
    // The key of a fragment in another packet can be that of a slot which holds nothing.
    if key.end() == FREE {
        return null_mut();
    }
    let home = home(key);
    let mut place = 0u64;
    while place < PLACES as u64 {
        if let Some(slot) = F::established().get_ptr_mut(home + place as u32)
            && let Some(flow) = flow_in::<F>(slot, again(key), differs)
        {
            return flow;
        }
        place = after(place);
    }
    F::overflow().get_ptr_mut(key).unwrap_or(null_mut())
}

/// The flow in a slot, if the slot is the key's. Processors that reorder reads keep those of the flow behind those of the key, because
/// its address depends on what they have found; others need not wait for that.
#[inline(always)] // the established path
fn flow_in<F: Maps>(
    slot: *mut Slot<F::Addr>,
    key: &FlowKey<F::Addr>,
    differs: impl Fn(&FlowKey<F::Addr>, &FlowKey<F::Addr>) -> usize,
) -> Option<*mut Flow<F::Addr>> {
    // SAFETY: a slot of an array, which lives as long as the map; any bytes are a valid key.
    let differs = differs(unsafe { &(*slot).key }, key);
    let nothing = if reads_in_order() { 0 } else { nothing_of(differs) };
    // SAFETY: within the slot: nothing is added.
    (differs == 0).then(|| unsafe { (&raw mut (*slot).flow).byte_add(nothing) })
}

/// Whether processors keep reads in their order.
#[inline(always)] // a constant of the verifier's
fn reads_in_order() -> bool {
    // SAFETY: a static of this object, which nobody writes once it is loaded.
    unsafe { (&raw const READS_IN_ORDER).read_volatile() != 0 }
}

/// Reads the end of a slot, so that its second cache line comes while its key is compared.
#[inline(always)] // a load
fn fetch_end<A>(slot: *mut Slot<A>) {
    // SAFETY: within the slot.
    let end = unsafe { slot.byte_add(size_of::<Slot<A>>() - 8) };
    // SAFETY: a load of eight bytes of the slot, whose value nobody uses.
    unsafe { asm!("{end} = *(u64 *)({end} + 0)", end = inout(reg) end => _, options(nostack, readonly)) }
}

/// Inserts or replaces an entry; false when there is no room.
#[inline(never)] // a frame of its own on a stack of 512 bytes
pub(crate) fn store<F: Maps>(key: &FlowKey<F::Addr>, flow: &Flow<F::Addr>) -> bool {
    let old = kept::<F>(key);
    if !old.is_null() && is_renewed(old, again(key), flow) {
        return true;
    }
    // One in the hash is replaced there.
    let first = if F::overflow().get_ptr(again(key)).is_none() { 0 } else { PLACES as u64 };
    let is_stored = put::<F>(first, again(key), flow);
    if is_stored && !old.is_null() {
        free(old, again(key));
    }
    is_stored
}

/// Removes an entry if it is there, wherever: two CPUs that have stored it at once may have left two.
#[inline(never)] // once per flow
pub(crate) fn remove<F: Maps>(key: &FlowKey<F::Addr>) {
    let home = home(key);
    let mut place = 0u64;
    while place < PLACES as u64 {
        let slot = holder::<F>(home + place as u32, again(key));
        if !slot.is_null() {
            free(slot, key);
        }
        place = after(place);
    }
    let _ = F::overflow().remove(key);
}

/// The slot with this index, if it is the key's; else null.
#[inline(always)] // an array read and a comparison
fn holder<F: Maps>(index: u32, key: &FlowKey<F::Addr>) -> *mut Slot<F::Addr> {
    // SAFETY: a slot of an array, which lives as long as the map; any bytes are a valid key.
    let is_the_keys = |slot: &*mut Slot<F::Addr>| differs(unsafe { &(**slot).key }, key) == 0;
    F::established().get_ptr_mut(index).filter(is_the_keys).unwrap_or(null_mut())
}

/// The slot that a key has, null when it has none.
#[inline(always)] // one caller
fn kept<F: Maps>(key: &FlowKey<F::Addr>) -> *mut Slot<F::Addr> {
    let home = home(key);
    let (mut place, mut slot) = (0u64, null_mut::<Slot<F::Addr>>());
    while place < PLACES as u64 && slot.is_null() {
        slot = holder::<F>(home + place as u32, again(key));
        place = after(place);
    }
    slot
}

/// Puts an entry into the first free place from this one on, or else into the hash, where one that is there is replaced.
#[inline(always)] // one caller
fn put<F: Maps>(mut place: u64, key: &FlowKey<F::Addr>, flow: &Flow<F::Addr>) -> bool {
    let home = home(key);
    while place < PLACES as u64 {
        if let Some(slot) = F::established().get_ptr_mut(home + place as u32)
            && exchange_if(state(slot), FREE, CLAIMED) == FREE
        {
            fill(slot, key, flow);
            exchange(state(slot), key.end());
            return true;
        }
        place = after(place);
    }
    F::overflow().insert(key, flow, BPF_ANY as u64).is_ok()
}

/// Writes a claimed slot, but for its state, word by word: the compiler would call a function that goes byte by byte.
#[inline(always)] // one caller
fn fill<A: Address>(slot: *mut Slot<A>, key: &FlowKey<A>, flow: &Flow<A>) {
    // SAFETY: within the slot.
    let to = unsafe { (&raw mut (*slot).flow).cast::<u32>() };
    copy((&raw const *key).cast(), slot.cast(), offset_of!(FlowKey<A>, sport) / 4);
    copy((&raw const *flow).cast(), to, size_of::<Flow<A>>() / 4);
}

/// Copies words, which both places have to have.
#[inline(always)] // a load and a store each
fn copy(from: *const u32, to: *mut u32, words: usize) {
    let mut word = 0;
    while word < words {
        // SAFETY: callers give aligned structures of so many words; nobody else writes them.
        unsafe { to.add(word).write_volatile(from.add(word).read()) }
        word += 1;
    }
}

/// Frees a slot, unless it is by now that of a key with other ports.
#[inline(always)] // an exchange
fn free<A: Address>(slot: *mut Slot<A>, key: &FlowKey<A>) {
    exchange_if(state(slot), key.end(), FREE);
}

/// The last key word of a slot.
#[inline(always)] // an addition
fn state<A>(slot: *mut Slot<A>) -> *mut u64 {
    const { assert!(offset_of!(Slot<A>, key) == 0 && offset_of!(FlowKey<A>, sport).is_multiple_of(8)) };
    // SAFETY: within the slot, which an array of the kernel keeps at a multiple of eight bytes.
    unsafe { slot.byte_add(offset_of!(FlowKey<A>, sport)).cast() }
}

/// Zero if and only if both keys are the same.
#[inline(always)] // the established path
pub(crate) fn differs<A: Address>(one: &FlowKey<A>, other: &FlowKey<A>) -> usize {
    opaque(one.differs(other) as usize)
}

/// Zero that depends on a number, for [`flow_in`].
#[inline(always)] // an instruction
fn nothing_of(number: usize) -> usize {
    let mut nothing = number;
    // SAFETY: arithmetic on a register. Not a pure function, so that it is not moved to where the compiler knows the number.
    unsafe { asm!("{nothing} &= 0", nothing = inout(reg) nothing, options(nomem, nostack)) }
    nothing
}

/// Index of the first place of a key.
#[inline(always)] // a hash
fn home<A: Address>(key: &FlowKey<A>) -> u32 {
    select::home(key, CONFIG.get(0).map_or(1, |config| config.established_homes))
}

/// Renews an entry in place, unless it is one of another translation.
#[inline(always)] // one caller
fn is_renewed<A: Address>(slot: *mut Slot<A>, key: &FlowKey<A>, flow: &Flow<A>) -> bool {
    // SAFETY: within the slot.
    let entry = unsafe { &mut (*slot).flow };
    if opaque(difference(entry, flow, Part::Translation) as usize) != 0 || entry.kind != flow.kind {
        return false;
    }
    let tag = tag_and_clock(slot);
    if opaque(difference(entry, flow, Part::Hop) as usize) != 0 {
        // SAFETY: an aligned word of the slot.
        let before = unsafe { tag.read_volatile() };
        let writing = before & !TAG | WRITING;
        if before == writing || exchange_if(tag, before, writing) != before {
            // Another CPU has asked for the next hop at the same time.
            return true;
        }
        write(entry, flow, Part::Hop);
    }
    if entry.closing != flow.closing || entry.replied != flow.replied {
        (entry.closing, entry.replied) = (flow.closing, flow.replied);
    }
    let seen = (flow.seen as u64) << 32;
    exchange(tag, seen | flow.routing as u64);
    // SAFETY: as above; any bytes are a valid key.
    if differs(unsafe { &(*slot).key }, key) != 0 {
        // The slot has changed hands meanwhile, and its flow must not go this way.
        exchange(tag, seen);
    }
    true
}

/// The word of an entry that has its routing tag, and behind that the clock of the last packet.
#[inline(always)] // an addition
fn tag_and_clock<A>(slot: *mut Slot<A>) -> *mut u64 {
    const {
        assert!((offset_of!(Slot<A>, flow) + offset_of!(Flow<A>, routing)).is_multiple_of(8));
        assert!(offset_of!(Flow<A>, seen) == offset_of!(Flow<A>, routing) + 4);
    }
    // SAFETY: within the slot, which an array of the kernel keeps at a multiple of eight bytes.
    unsafe { slot.byte_add(offset_of!(Slot<A>, flow) + offset_of!(Flow<A>, routing)).cast() }
}

/// Zero if and only if an entry and a flow have the same in these words.
#[inline(always)] // loads
fn difference<A: Address>(entry: &Flow<A>, flow: &Flow<A>, part: Part) -> u32 {
    let (one, other) = ((&raw const *entry).cast::<u32>(), (&raw const *flow).cast::<u32>());
    let (mut difference, mut word) = (0, 0);
    while word < size_of::<Flow<A>>() / 4 {
        if part_of::<A>(word) == part {
            // SAFETY: both are a flow, of aligned words without padding.
            difference |= unsafe { one.add(word).read_volatile() ^ other.add(word).read_volatile() };
        }
        word += 1;
    }
    difference
}

/// Writes these words of a flow to an entry, one after the other.
#[inline(always)] // loads and stores
fn write<A: Address>(entry: &mut Flow<A>, flow: &Flow<A>, part: Part) {
    let (to, from) = ((&raw mut *entry).cast::<u32>(), (&raw const *flow).cast::<u32>());
    let mut word = 0;
    while word < size_of::<Flow<A>>() / 4 {
        if part_of::<A>(word) == part {
            // SAFETY: both are a flow, of aligned words without padding.
            unsafe { to.add(word).write_volatile(from.add(word).read_volatile()) }
        }
        word += 1;
    }
}

/// What a word of a flow says.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Hop,
    Translation,
    /// What packets change.
    Other,
}

/// What the word at this position says.
#[inline(always)] // a constant
const fn part_of<A: Address>(word: usize) -> Part {
    let at = 4 * word;
    // The kind of a flow lies beside its MTU and its way out.
    if (at >= offset_of!(Flow<A>, dmac) && at <= offset_of!(Flow<A>, ifindex))
        || at == offset_of!(Flow<A>, mtu)
    {
        Part::Hop
    } else if at == offset_of!(Flow<A>, routing)
        || at == offset_of!(Flow<A>, seen)
        || at == offset_of!(Flow<A>, closing)
    {
        Part::Other
    } else {
        Part::Translation
    }
}
