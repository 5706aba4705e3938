//! What the object says of the kernel programs: their stack, added up over calls as the strictest supported verifier does, and
//! whether their tail calls can become jumps.
//!
//! Newer kernels round frames to 16 bytes and are content with programs that older ones refuse; the machine that builds
//! is seldom the oldest one that runs them.

use anyhow::{Context, Result, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What a program and all it calls may use together (`MAX_BPF_STACK`).
pub(crate) const STACK_MAX: u32 = 512;
/// What each frame is rounded up to before kernel 6.8, and its least size (`check_max_stack_depth`).
const FRAME_STEP: u32 = 32;
/// Deeper than the verifier allows; a chain this long is a loop.
const CALLS_MAX: usize = 16;

const SECTION_SYMBOLS: u32 = 2;
const SECTION_RELOCATIONS: u32 = 9;
const SYMBOL_FUNCTION: u8 = 2;
const INSTRUCTION: usize = 8;
/// Opcodes and registers (Documentation/bpf/standardization/instruction-set.rst).
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const JUMP_FAR: u8 = 0x06;
const CLASSES_JUMP: [u8; 2] = [5, 6];
const CALL_LOCAL: u8 = 1;
const CALL_HELPER: u8 = 0;
const TAIL_CALL: i32 = 12;
const SLOT: u8 = 3;
/// Moves of a constant, of 64 and 32 bits.
const MOVES_CONSTANT: [u8; 2] = [0xb7, 0xb4];
const MOVE: u8 = 0xbf;
const ADD: u8 = 0x07;
const FRAME_POINTER: u8 = 10;
const CLASS_LOAD: u8 = 1;
const CLASSES_STORE: [u8; 2] = [2, 3];

/// A place in the object: section and offset.
type Place = (usize, usize);

struct Function {
    name: String,
    frame: u32,
    calls: Vec<Place>,
    loose_tail_calls: u32,
    is_program: bool,
}

/// What a program takes, and the chain of calls that takes it.
pub(crate) struct Used {
    pub(crate) program: String,
    pub(crate) bytes: u32,
    /// The functions of the chain, with the bytes of each.
    pub(crate) chain: Vec<String>,
    /// Tail calls of its own whose slot is not set right before them. The kernel makes a jump of a call whose slot it knows, and
    /// else an indirect one (`record_func_key` and `do_misc_fixups` in kernel/bpf/verifier.c).
    pub(crate) loose_tail_calls: u32,
}

/// What every program of an object takes.
pub(crate) fn used(object: &Path) -> Result<Vec<Used>> {
    let bytes = std::fs::read(object).with_context(|| format!("cannot read {}", object.display()))?;
    let functions = functions(&bytes).with_context(|| format!("{} is no BPF object", object.display()))?;
    let programs = functions.iter().filter(|(_, function)| function.is_program);
    let used = programs.map(|(place, function)| {
        let mut chain = Vec::new();
        let bytes = deepest(&functions, *place, &mut chain, 0)?;
        let Function { name, loose_tail_calls, .. } = function;
        Ok(Used { program: name.clone(), bytes, chain, loose_tail_calls: *loose_tail_calls })
    });
    used.collect()
}

/// Bytes of the longest chain from a function, each frame rounded, with its frames.
fn deepest(
    functions: &BTreeMap<Place, Function>,
    at: Place,
    chain: &mut Vec<String>,
    calls: usize,
) -> Result<u32> {
    ensure!(calls < CALLS_MAX, "a chain of more than {CALLS_MAX} calls");
    let function = functions.get(&at).context("a call leads to no function")?;
    let (mut most, mut below) = (0, Vec::new());
    for &call in &function.calls {
        let mut callees = Vec::new();
        let used = deepest(functions, call, &mut callees, calls + 1)?;
        if used > most {
            (most, below) = (used, callees);
        }
    }
    chain.push(format!("{:3} {}", function.frame, function.name));
    chain.append(&mut below);
    Ok(function.frame.max(1).next_multiple_of(FRAME_STEP) + most)
}

/// Every function of an object, by its place.
fn functions(object: &[u8]) -> Option<BTreeMap<Place, Function>> {
    let sections = sections(object)?;
    let symbols = symbols(object, &sections)?;
    let mut targets = BTreeMap::new();
    for section in sections.iter().filter(|section| section.kind == SECTION_RELOCATIONS) {
        for entry in section.content(object)?.chunks_exact(16) {
            let symbol = symbols.get((number(entry, 8, 8)? >> 32) as usize)?;
            targets.insert((section.info, number(entry, 0, 8)? as usize), symbol);
        }
    }
    let mut functions = BTreeMap::new();
    for symbol in symbols.iter().filter(|symbol| symbol.kind == SYMBOL_FUNCTION) {
        let section = sections.get(symbol.section)?;
        let code = section.content(object)?.get(symbol.offset..symbol.offset + symbol.size)?;
        let mut function = Function {
            name: symbol.name.clone(),
            frame: 0,
            calls: Vec::new(),
            loose_tail_calls: 0,
            is_program: section.name != ".text",
        };
        // Registers that hold the frame pointer, until something is taken off it.
        let mut copies = [false; 16];
        let (mut has_slot, joined) = (false, jump_targets(code));
        for (index, instruction) in code.chunks_exact(INSTRUCTION).enumerate() {
            let (opcode, registers) = (instruction[0], instruction[1]);
            let (to, from) = (registers & 15, registers >> 4);
            let offset = i16::from_le_bytes([instruction[2], instruction[3]]);
            let value = i32::from_le_bytes(instruction[4..8].try_into().ok()?);
            let class = opcode & 7;
            let is_on_stack = (class == CLASS_LOAD && from == FRAME_POINTER)
                || (CLASSES_STORE.contains(&class) && to == FRAME_POINTER);
            let reach = if is_on_stack {
                -i32::from(offset)
            } else if opcode == ADD && std::mem::take(&mut copies[usize::from(to)]) {
                -value
            } else {
                0
            };
            function.frame = function.frame.max(u32::try_from(reach).unwrap_or(0));
            if opcode == MOVE {
                copies[usize::from(to)] = from == FRAME_POINTER;
            }
            if opcode == CALL && from == CALL_HELPER && value == TAIL_CALL {
                function.loose_tail_calls += u32::from(!has_slot || joined.contains(&index));
            }
            has_slot = MOVES_CONSTANT.contains(&opcode) && to == SLOT;
            if opcode == CALL && from == CALL_LOCAL {
                let at = symbol.offset + index * INSTRUCTION;
                let beyond =
                    |base: usize| base.checked_add_signed((value as isize + 1) * INSTRUCTION as isize);
                function.calls.push(match targets.get(&(symbol.section, at)) {
                    Some(target) if target.kind == SYMBOL_FUNCTION => (target.section, target.offset),
                    // Relative to the section that the symbol stands for.
                    Some(target) => (target.section, beyond(0)?),
                    None => (symbol.section, beyond(at)?),
                });
            }
        }
        functions.insert((symbol.section, symbol.offset), function);
    }
    Some(functions)
}

/// The instructions of a function that jumps lead to.
fn jump_targets(code: &[u8]) -> BTreeSet<usize> {
    let jumps = code.chunks_exact(INSTRUCTION).enumerate().filter(|(_, instruction)| {
        CLASSES_JUMP.contains(&(instruction[0] & 7)) && ![CALL, EXIT].contains(&instruction[0])
    });
    let target = |(index, instruction): (usize, &[u8])| {
        let far = [instruction[4], instruction[5], instruction[6], instruction[7]];
        let near = [instruction[2], instruction[3]];
        let by = if instruction[0] == JUMP_FAR {
            i32::from_le_bytes(far)
        } else {
            i16::from_le_bytes(near).into()
        };
        index.checked_add_signed(by as isize + 1)
    };
    jumps.filter_map(target).collect()
}

struct Section {
    name: String,
    kind: u32,
    offset: usize,
    size: usize,
    link: usize,
    info: usize,
}

impl Section {
    fn content<'a>(&self, object: &'a [u8]) -> Option<&'a [u8]> {
        object.get(self.offset..self.offset + self.size)
    }
}

struct Symbol {
    name: String,
    kind: u8,
    section: usize,
    offset: usize,
    size: usize,
}

/// Section headers (ELF64, little-endian).
fn sections(object: &[u8]) -> Option<Vec<Section>> {
    let (table, count, names) = (number(object, 40, 8)?, number(object, 60, 2)?, number(object, 62, 2)?);
    let header = |index: u64| {
        let at = (table + index * 64) as usize;
        let field =
            |offset: usize, size: usize| number(object, at + offset, size).map(|value| value as usize);
        Some((field(0, 4)?, field(4, 4)? as u32, field(24, 8)?, field(32, 8)?, field(40, 4)?, field(44, 4)?))
    };
    let strings = header(names)?.2;
    let section = |index| {
        let (name, kind, offset, size, link, info) = header(index)?;
        Some(Section { name: text(object, strings + name)?, kind, offset, size, link, info })
    };
    (0..count).map(section).collect()
}

fn symbols(object: &[u8], sections: &[Section]) -> Option<Vec<Symbol>> {
    let table = sections.iter().find(|section| section.kind == SECTION_SYMBOLS)?;
    let strings = sections.get(table.link)?.offset;
    let symbol = |entry: &[u8]| {
        Some(Symbol {
            name: text(object, strings + number(entry, 0, 4)? as usize)?,
            kind: entry[4] & 15,
            section: number(entry, 6, 2)? as usize,
            offset: number(entry, 8, 8)? as usize,
            size: number(entry, 16, 8)? as usize,
        })
    };
    table.content(object)?.chunks_exact(24).map(symbol).collect()
}

fn number(bytes: &[u8], at: usize, size: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + size)?;
    Some(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
}

fn text(bytes: &[u8], at: usize) -> Option<String> {
    let text = bytes.get(at..)?.split(|&byte| byte == 0).next()?;
    Some(String::from_utf8_lossy(text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(name: &str, frame: u32, calls: &[usize]) -> Function {
        let calls = calls.iter().map(|&at| (1, at)).collect();
        Function { name: name.to_owned(), frame, calls, loose_tail_calls: 0, is_program: name == "program" }
    }

    #[test]
    fn frames_are_rounded_and_the_longest_chain_counts() {
        let functions = BTreeMap::from([
            ((1, 0), function("program", 184, &[8, 16])),
            ((1, 8), function("short", 200, &[])),
            ((1, 16), function("long", 144, &[24])),
            ((1, 24), function("empty", 0, &[])),
        ]);
        let mut chain = Vec::new();
        assert_eq!(deepest(&functions, (1, 0), &mut chain, 0).unwrap(), 192 + 224);
        assert_eq!(chain, ["184 program", "200 short"]);
        assert_eq!(
            deepest(&functions, (1, 16), &mut Vec::new(), 0).unwrap(),
            160 + 32,
            "an empty frame counts"
        );
    }

    #[test]
    fn a_loop_of_calls_is_refused() {
        let functions = BTreeMap::from([((1, 0), function("program", 8, &[0]))]);
        assert!(deepest(&functions, (1, 0), &mut Vec::new(), 0).is_err());
    }

    #[test]
    fn jumps_lead_to_the_instruction_behind_them_and_their_offset() {
        let code =
            [[0xb7, 3, 0, 0, 1, 0, 0, 0], [CALL, 0, 0, 0, 12, 0, 0, 0], [0x05, 0, 0xfe, 0xff, 0, 0, 0, 0]];
        assert_eq!(jump_targets(code.as_flattened()), BTreeSet::from([1]));
    }

    #[test]
    fn what_is_no_object_is_refused() {
        assert!(functions(b"\x7fELF").is_none());
        assert!(functions(&[0; 64]).is_none());
    }
}
