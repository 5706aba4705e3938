//! The maps as [`Tables`]: the only place in the kernel that reads and writes them.

use core::{
    ffi::c_void,
    marker::PhantomData,
    ops::{Deref, DerefMut},
};

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers,
    maps::{ProgramArray, lpm_trie},
};
use xdp_common::{
    answer::AnswerFrame,
    fragment::{FragmentKey, FragmentPorts, FragmentTables, first},
    frame::{Frame, Packet},
    gate,
    icmp::{Message, Translation},
    net::{Family, FlowKey},
    tables::{
        self, Affinity, AffinityKey, Backend, BackendKey, Config, Device, Entry, Flow, Frontend, FrontendKey,
        Insertion, KnownHop, Mapped, NetworkKey, Route, Table, Tables, Work,
    },
    verdict::Counter,
};

use crate::{
    ANSWERS, CONFIG, COUNTERS, atomic, embryonic, established,
    family::{Found, Maps},
};

/// The maps of a family, and the context of the program that asks.
pub(crate) struct Kernel<F> {
    pub(crate) ctx: *mut c_void,
    family: PhantomData<F>,
}

impl<F> Clone for Kernel<F> {
    #[inline(always)] // a pointer
    fn clone(&self) -> Self {
        *self
    }
}

impl<F> Copy for Kernel<F> {}

impl<F> Kernel<F> {
    #[inline(always)] // a pointer
    pub(crate) fn new(ctx: *mut c_void) -> Self {
        Self { ctx, family: PhantomData }
    }
}

/// A live entry of a flow table.
pub(crate) struct Live<F: Maps> {
    flow: *mut Flow<F::Addr>,
    /// Its key, in the embryonic table, which orders its entries by worth.
    embryo: Option<*const FlowKey<F::Addr>>,
}

impl<F: Maps> Live<F> {
    /// That of a flow, unless the pointer is null.
    #[inline(always)] // a comparison
    fn of(flow: *mut Flow<F::Addr>, embryo: Option<*const FlowKey<F::Addr>>) -> Option<Self> {
        if flow.is_null() { None } else { Some(Self { flow, embryo }) }
    }
}

/// The work area of this CPU.
pub(crate) struct Area<F: Maps>(*mut Work<F::Addr>);

impl<F: Maps> Deref for Area<F> {
    type Target = Work<F::Addr>;

    #[inline(always)]
    fn deref(&self) -> &Work<F::Addr> {
        // SAFETY: a slot of a per-CPU array, all bytes of which are valid, and which nobody else uses while this program
        // runs: programs run with bottom halves off, and the decision takes the area once.
        unsafe { &*self.0 }
    }
}

impl<F: Maps> DerefMut for Area<F> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut Work<F::Addr> {
        // SAFETY: as in `deref`.
        unsafe { &mut *self.0 }
    }
}

/// Kernel clock ticks in one bucket of the routing tag, as a shift: 4,096 ticks are 4 to 41 seconds (HZ 1000 to 100).
const ROUTING_BUCKET_SHIFT: u32 = 12;

impl<F: Maps> Deref for Live<F> {
    type Target = Flow<F::Addr>;

    #[inline(always)]
    fn deref(&self) -> &Flow<F::Addr> {
        // SAFETY: the pointer comes from a lookup and lives until the program ends (RCU). An element that is removed may
        // be given to another flow meanwhile; what is read then is still an entry of the same type.
        unsafe { &*self.flow }
    }
}

impl<F: Maps> Entry<F::Addr> for Live<F> {
    #[inline(always)]
    fn set_seen(&self, clock: u32) {
        // SAFETY: as in `deref`; an aligned word.
        unsafe { (&raw mut (*self.flow).seen).write_volatile(clock) }
        if let Some(key) = self.embryo {
            // SAFETY: the key that the entry was looked up by, which its caller holds longer than the entry.
            embryonic::renew::<F>(unsafe { &*key }, false);
        }
    }

    #[inline(always)]
    fn set_replied(&self) {
        // SAFETY: as in `deref`; one byte, which every CPU sets to the same value.
        unsafe { (&raw mut (*self.flow).replied).write_volatile(1) }
        if let Some(key) = self.embryo {
            // SAFETY: as in `set_seen`.
            embryonic::renew::<F>(unsafe { &*key }, true);
        }
    }

    #[inline(always)]
    fn set_closing(&self, bits: u8) {
        // SAFETY: as in `deref`; one byte.
        unsafe { (&raw mut (*self.flow).closing).write_volatile(bits) }
    }
}

impl<F: Maps> Tables<F> for Kernel<F> {
    type Entry = Live<F>;
    type Work = Area<F>;

    #[inline(always)]
    fn config(self) -> Config {
        // The one slot is always there; the fallback lets the gate admit no SNAT port.
        CONFIG.get(0).copied().unwrap_or(Config {
            epoch: 0,
            clock: 0,
            snat_port_min: 1,
            snat_port_max: 0,
            embryonic_buckets: 0,
            established_homes: 0,
            masquerade_wire: 1,
            policy_routing: 1,
            echo: 0,
            direct: 0,
        })
    }

    #[inline(always)]
    fn routing_tag(self, epoch: u32) -> u32 {
        // SAFETY: the helper takes nothing; the JIT inlines it.
        let bucket = unsafe { helpers::bpf_jiffies64() } >> ROUTING_BUCKET_SHIFT;
        (bucket as u32).wrapping_add(epoch).max(1)
    }

    #[inline(always)]
    fn ingress_gate(self, word: u32) -> u64 {
        F::gate_ingress().get(word).copied().unwrap_or(u64::MAX)
    }

    #[inline(always)]
    fn egress_gate(self, word: u32) -> u64 {
        F::gate_egress().get(word).copied().unwrap_or(u64::MAX)
    }

    #[inline(always)]
    fn work(self) -> Option<Area<F>> {
        F::work().get_ptr_mut(0).map(Area)
    }

    #[inline(always)]
    fn may_know(self, bit: u32) -> bool {
        let half = F::known().get(2 * tables::KNOWN_WORDS).copied().unwrap_or(0) as u32 & 1;
        let word = F::known().get(half * tables::KNOWN_WORDS + bit / 64).copied().unwrap_or(u64::MAX);
        word >> (bit % 64) & 1 == 1
    }

    #[inline(always)]
    fn note_known(self, bit: u32) {
        for half in [0, tables::KNOWN_WORDS] {
            if let Some(word) = F::known().get_ptr_mut(half + bit / 64) {
                // SAFETY: a word of the map, in which programs and the agent set bits as atomics do.
                unsafe { atomic::set_bits(word, 1 << (bit % 64)) }
            }
        }
    }

    #[inline(always)]
    fn flow(self, table: Table, key: &FlowKey<F::Addr>) -> Option<Live<F>> {
        match table {
            Table::Established => Live::of(established::find::<F>(key), None),
            Table::Embryonic => Live::of(embryonic::find::<F>(key), Some(key)),
        }
    }

    #[inline(always)]
    fn established(self, config: &Config, key: &FlowKey<F::Addr>) -> Option<Live<F>> {
        Live::of(established::find_at_home::<F>(config, key), None)
    }

    #[inline(always)]
    fn insert(self, key: &FlowKey<F::Addr>, flow: &Flow<F::Addr>) -> Insertion {
        embryonic::put::<F>(key, flow, false)
    }

    #[inline(always)]
    fn store(self, table: Table, key: &FlowKey<F::Addr>, flow: &Flow<F::Addr>) -> bool {
        match table {
            Table::Established => established::store::<F>(key, flow),
            Table::Embryonic => embryonic::put::<F>(key, flow, true) == Insertion::Done,
        }
    }

    #[inline(always)]
    fn remove(self, table: Table, key: &FlowKey<F::Addr>) {
        match table {
            Table::Established => established::remove::<F>(key),
            Table::Embryonic => _ = embryonic::remove::<F>(key),
        }
    }

    #[inline(always)]
    fn frontend(self, key: &FrontendKey<F::Addr>) -> Option<Frontend> {
        // SAFETY: copied at once; the agent replaces frontends as whole elements.
        unsafe { F::frontends().get(key) }.copied()
    }

    #[inline(always)]
    fn ring(self, slot: u32) -> u32 {
        F::rings().get(slot).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn backend(self, id: u32) -> Option<Backend<F::Addr>> {
        F::backends().get(id).copied().filter(|backend| backend.proto != 0)
    }

    #[inline(always)]
    fn network(self, owner: u32, addr: F::Addr) -> bool {
        let key = NetworkKey { owner: owner.to_be_bytes(), addr };
        let bits = 8 * size_of::<NetworkKey<F::Addr>>() as u32;
        // A network that holds an address may have an exception of value 0.
        F::networks().get(lpm_trie::Key::new(bits, key)).is_some_and(|value| *value != 0)
    }

    #[inline(always)]
    fn affinity(self, key: &AffinityKey<F::Addr>) -> Option<Affinity> {
        // SAFETY: copied at once; a torn copy names a backend that is checked like any other.
        unsafe { F::affinity().get(key) }.copied()
    }

    #[inline(always)]
    fn set_affinity(self, key: &AffinityKey<F::Addr>, affinity: &Affinity) -> bool {
        F::affinity().insert(key, affinity, BPF_ANY as u64).is_ok()
    }

    #[inline(always)]
    fn account(self, service: u32, bytes: u16) {
        if let Some(account) = F::accounts().get_ptr_mut(service).or_else(|| F::accounts().get_ptr_mut(0)) {
            // SAFETY: the slot belongs to this CPU and programs do not interrupt each other on it.
            unsafe {
                (*account).packets += 1;
                (*account).bytes += bytes as u64;
            }
        }
    }

    #[inline(always)]
    fn device(self, ifindex: u32) -> Option<Device<F::Addr>> {
        // SAFETY: copied at once; the agent replaces devices as whole elements.
        unsafe { F::devices().get(ifindex) }.copied()
    }

    #[inline(always)]
    fn route(self, ifindex: u32, src: F::Addr, dst: F::Addr, tos: u8, proto: u8) -> Route {
        let slot = gate::snat_bit(dst) % F::Addr::MAPS.hops.entries;
        let known = if self.config().policy_routing == 0 { F::hops().get_ptr_mut(slot) } else { None };
        let tag = self.routing_tag(self.config().epoch);
        if let Some(known) = known {
            // SAFETY: the slot belongs to this CPU and programs do not interrupt each other on it.
            let hop = unsafe { *known };
            if hop.routing == tag && hop.dst == dst && hop.from == ifindex {
                return Route::Hop { ifindex: hop.ifindex, dmac: hop.dmac, smac: hop.smac, mtu: hop.mtu };
            }
        }
        let answer = self.ask(ifindex, src, dst, tos, proto);
        if let (Some(known), Route::Hop { ifindex: out, dmac, smac, mtu }) = (known, answer) {
            let hop =
                KnownHop { dst, from: ifindex, routing: tag, ifindex: out, dmac, smac, mtu, zero: [0; 2] };
            // SAFETY: as above.
            unsafe { *known = hop }
        }
        answer
    }

    #[inline(always)] // no room for a frame of its own
    fn source(self, packet: &Packet<F::Addr>, ifindex: u32, dst: F::Addr) -> Option<F::Addr> {
        let addr = F::chooses_source(dst, |params| {
            self.look_up(params, packet.ifindex, packet.key.src, dst, packet.tos, packet.key.proto);
        });
        let bits = (size_of::<NetworkKey<F::Addr>>() * 8) as u32;
        let key = NetworkKey { owner: ifindex.to_be_bytes(), addr };
        F::sources().get(lpm_trie::Key::new(bits, key)).map(|source| source.addr)
    }

    #[inline(always)]
    fn count(self, counter: Counter) {
        count(counter);
    }

    #[inline(always)]
    fn count_exhausted(self, backend: &BackendKey<F::Addr>) {
        match F::exhausted().get_ptr_mut(backend) {
            Some(times) => atomic::add(times, 1),
            // Of CPUs that are the first at once, one counts.
            None => _ = F::exhausted().insert(backend, 1, BPF_NOEXIST as u64),
        }
    }
}

impl<F: Maps> FragmentTables<F> for Kernel<F> {
    #[inline(always)]
    fn ports(self, key: &FragmentKey<F::Addr>) -> FragmentPorts {
        // SAFETY: copied at once; a torn copy is of two packets with the same identification, one of which is lost anyway.
        match unsafe { F::fragments().get(key) } {
            Some(ports) => *ports,
            None => FragmentPorts::without(first::UNKNOWN, 0),
        }
    }

    #[inline(always)]
    fn set_ports(self, key: &FragmentKey<F::Addr>, ports: &FragmentPorts) {
        let _ = F::fragments().insert(key, ports, BPF_ANY as u64);
    }

    #[inline(always)]
    fn await_first(self, key: &FragmentKey<F::Addr>, ports: &FragmentPorts) {
        let _ = F::fragments().insert(key, ports, BPF_NOEXIST as u64);
    }
}

/// Nanoseconds in a period of answers, as a shift: 1.07 seconds.
const ANSWERS_PERIOD_SHIFT: u32 = 30;

/// Takes one from this CPU's allowance of answers, and gives the room to put it together; nothing when none is left.
#[inline(always)] // one caller per program
pub(crate) fn answer_area() -> Option<&'static mut AnswerFrame> {
    let answers = answers()?;
    answers.spent += 1;
    if answers.spent <= tables::ANSWERS_PER_PERIOD_MAX { Some(&mut answers.frame) } else { None }
}

/// The room to put an answer together that is not allotted, because it takes the place of what has come in.
#[inline(always)] // as above
pub(crate) fn answer_room() -> Option<&'static mut AnswerFrame> {
    // SAFETY: the slot belongs to this CPU and programs do not interrupt each other on it.
    ANSWERS.get_ptr_mut(0).map(|answers| unsafe { &mut (*answers).frame })
}

/// Takes one from this CPU's allowance of answers to echo requests; whether there was one left.
#[inline(always)] // as above
pub(crate) fn may_echo() -> bool {
    let Some(answers) = answers() else { return false };
    answers.echoed += 1;
    answers.echoed <= tables::ANSWERS_PER_PERIOD_MAX
}

/// What is known of answers in the present period.
#[inline(always)] // two callers
fn answers() -> Option<&'static mut tables::Answers> {
    let slot = ANSWERS.get_ptr_mut(0)?;
    // SAFETY: the helper takes nothing.
    let period = (unsafe { helpers::bpf_ktime_get_ns() } >> ANSWERS_PERIOD_SHIFT) as u32;
    // SAFETY: the slot belongs to this CPU and programs do not interrupt each other on it.
    let answers = unsafe { &mut *slot };
    if answers.period != period {
        (answers.period, answers.spent, answers.echoed) = (period, 0, 0);
    }
    Some(answers)
}

/// The place of the packet at hand. It is where programs share memory: the stack is small, and what is read from there is
/// unknown to the verifier, which then need not follow every way through the headers to the end.
#[inline(always)] // bounds proofs do not survive a call
pub(crate) fn place<F: Maps>() -> Option<&'static mut Packet<F::Addr>> {
    let place = F::packets().get_ptr_mut(0)?;
    // SAFETY: the slot belongs to this CPU, and programs do not interrupt each other on it.
    Some(unsafe { &mut *place })
}

/// An ICMP message, and what becomes of it.
type Icmp<F> = (&'static mut Message<<F as Family>::Addr>, &'static mut Translation<<F as Family>::Addr>);

/// Where an ICMP message is read to, and what becomes of it: memory that programs share, for the same reasons.
#[inline(always)] // one caller per program
pub(crate) fn message<F: Maps>() -> Option<Icmp<F>> {
    let (message, translation) = (F::messages().get_ptr_mut(0)?, F::translations().get_ptr_mut(0)?);
    // SAFETY: the slots belong to this CPU, programs do not interrupt each other on it, and each takes them once.
    Some(unsafe { (&mut *message, &mut *translation) })
}

/// The packet in a frame, if it is whole.
#[inline(always)] // as above
pub(crate) fn parse<F: Maps, R: Frame>(frame: &R, ifindex: u32) -> Option<&'static Packet<F::Addr>> {
    let place = place::<F>()?;
    if F::parse_into(frame, ifindex, place) == Found::Packet { Some(place) } else { None }
}

/// Goes on to another program; returns only when the slot is empty.
///
/// The call is written out because the compiler would make one of two, with the slot in a register: the kernel makes a jump of
/// a call whose slot it knows, and else an indirect one, which costs a packet 8 ns where the kernel guards those.
#[cfg(target_arch = "bpf")]
#[inline(always)] // four instructions
pub(crate) fn go_on<C: EbpfContext, const SLOT: u32>(programs: &ProgramArray, ctx: &C) {
    // SAFETY: as the helper's signature has it (include/uapi/linux/bpf.h, bpf_tail_call is number 12): a context, which is the
    // verifier's, a map of programs, and a number. A program that follows finds the context as it is.
    unsafe {
        core::arch::asm!("r3 = {slot}", "call 12", slot = const SLOT, inout("r1") ctx.as_ptr() => _,
            inout("r2") &raw const *programs => _, out("r0") _, out("r3") _, out("r4") _, out("r5") _);
    }
}

/// Stands in where the crate is only checked: the host has no registers of these names.
#[cfg(not(target_arch = "bpf"))]
pub(crate) fn go_on<C: EbpfContext, const SLOT: u32>(_programs: &ProgramArray, _ctx: &C) {}

/// The packet that this program has parsed last, for functions that are handed less than a reference to it.
#[inline(always)] // a lookup
pub(crate) fn parsed<F: Maps>() -> Option<&'static Packet<F::Addr>> {
    // SAFETY: as in `parse`; nobody writes there before the next frame.
    F::packets().get_ptr(0).map(|place| unsafe { &*place })
}

/// Counts on this CPU.
#[inline(always)] // an array increment
pub(crate) fn count(counter: Counter) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter.index()) {
        // SAFETY: the slot belongs to this CPU and programs do not interrupt each other on it.
        unsafe { *slot += 1 }
    }
}
