"""The parts of an ELF file that an emulator needs: segments, section sizes, symbols."""

import struct
from dataclasses import dataclass


@dataclass(frozen=True)
class Symbol:
    """Where a function or variable lies; the address has no Thumb bit."""

    address: int
    size: int


class Elf:
    """Little-endian ELF, 32 or 64 bits.

    segments: (address, bytes, size in memory); sections: sizes by name, of those that take memory;
    functions: all of them, static ones too (the last of a name); objects: the variables.
    """

    def __init__(self, data: bytes) -> None:
        if data[:4] != b"\x7fELF" or data[5] != 1:
            raise ValueError("expected a little-endian ELF file")
        wide = data[4] == 2
        thumb = struct.unpack_from("<H", data, 18)[0] == 40  # EM_ARM
        if wide:
            ph, sh, _, _, ph_size, ph_count, sh_size, sh_count, names = struct.unpack_from("<QQIHHHHHH", data, 32)
        else:
            ph, sh, _, _, ph_size, ph_count, sh_size, sh_count, names = struct.unpack_from("<IIIHHHHHH", data, 28)
        self.segments: list[tuple[int, bytes, int]] = []
        for at in range(ph, ph + ph_size * ph_count, ph_size):
            if wide:
                kind, _, offset, address, _, in_file, in_memory, _ = struct.unpack_from("<IIQQQQQQ", data, at)
            else:
                kind, offset, address, _, in_file, in_memory, _, _ = struct.unpack_from("<8I", data, at)
            if kind == 1 and in_memory:  # PT_LOAD
                self.segments.append((address, data[offset : offset + in_file], in_memory))
        sections = []
        for at in range(sh, sh + sh_size * sh_count, sh_size):
            form = "<IIQQQQIIQQ" if wide else "<10I"
            sections.append(struct.unpack_from(form, data, at))

        def text(table: tuple, at: int) -> str:
            start = table[4] + at
            return data[start : data.index(b"\0", start)].decode()

        self.sections = {text(sections[names], s[0]): s[5] for s in sections if s[2] & 2}  # SHF_ALLOC
        self.functions: dict[str, Symbol] = {}
        self.objects: dict[str, Symbol] = {}
        for section in sections:
            if section[1] != 2:  # SHT_SYMTAB
                continue
            strings, size = sections[section[6]], section[9]
            for at in range(section[4], section[4] + section[5], size):
                if wide:
                    name, info, _, index, address, length = struct.unpack_from("<IBBHQQ", data, at)
                else:
                    name, address, length, info, _, index = struct.unpack_from("<IIIBBH", data, at)
                if index and info & 15 == 2:
                    self.functions[text(strings, name)] = Symbol(address & ~1 if thumb else address, length)
                elif index and info & 15 == 1:
                    self.objects[text(strings, name)] = Symbol(address, length)

    def symbol(self, name: str) -> Symbol:
        """The function or variable of that name."""
        for table in (self.functions, self.objects):
            if name in table:
                return table[name]
        raise KeyError(f"no symbol {name!r}; there are {', '.join(sorted(self.functions))}")

    def start(self, address: int) -> int:
        """The first address of the segment that holds this one."""
        return next(start for start, data, _ in self.segments if start <= address < start + len(data))

    def bytes(self, address: int, size: int) -> bytes:
        """What the file holds for these addresses."""
        for start, data, _ in self.segments:
            if start <= address and address + size <= start + len(data):
                return data[address - start : address - start + size]
        raise ValueError(f"expected addresses of the program, got {address:#x} to {address + size:#x}")
