// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"bufio"
	"bytes"
	"cmp"
	"io"
	"math"
	"os"
	"slices"
	"strconv"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// Backing says what memory is made of, which decides how it may be written.
type Backing uint8

// The kinds of memory.
const (
	BackingNone      Backing = iota // not looked up, or nothing to look up
	BackingAnonymous                // heap, stack, anonymous mappings: stays until it is unmapped, so stores are safe
	BackingFile                     // backed by a file, also memfd and shared memory: somebody may truncate it, so kernel copies only
	BackingDevice                   // lies on a device: only the device's copies may touch it, see [Device]
)

const mapsPath = "/proc/self/maps"

// mapsBuffer holds the longest line of the memory map: a path of PATH_MAX bytes, each of them possibly escaped to four.
const mapsBuffer = 32 << 10

// ProbeWritable looks spans up in the memory map of this process, which it reads once. It returns [BackingFile] when any part of
// them is backed by a file of whatever kind, else [BackingAnonymous]; and status.ParamInvalid, with the address, when any byte is not mapped
// or not writable. Where there is no memory map to read it returns BackingFile: what could not be looked up is left to system
// calls, which answer EFAULT. Spans of no bytes are ignored.
//
// The answer is of this moment; that memory stays mapped while it is in use is the promise of the one who registered it.
func ProbeWritable(spans []Span) (Backing, error) {
	wanted := slices.DeleteFunc(slices.Clone(spans), func(s Span) bool { return s.Bytes == 0 })
	for _, s := range wanted {
		if s.Bytes > math.MaxUint64-uint64(s.Addr) {
			return BackingNone, unusable(uint64(s.Addr), s, "runs beyond the address space")
		}
	}
	if len(wanted) == 0 {
		return BackingNone, nil
	}
	slices.SortFunc(wanted, func(a, b Span) int { return cmp.Compare(a.Addr, b.Addr) })
	file, err := os.Open(mapsPath)
	if err != nil {
		return BackingFile, nil
	}
	defer func() { _ = file.Close() }()
	return coverWritable(file, wanted)
}

// coverWritable walks through the memory map and the spans, both sorted by address, side by side.
func coverWritable(maps io.Reader, spans []Span) (Backing, error) {
	reader := bufio.NewReaderSize(maps, mapsBuffer)
	backing := BackingAnonymous
	first, reached := 0, uint64(0) // spans before first are covered; the address below which everything wanted is covered
	for first < len(spans) {
		line, err := reader.ReadSlice('\n')
		if err == io.EOF {
			break
		}
		area, ok := parseArea(line)
		if err != nil || !ok {
			return BackingFile, nil // a map that we can't read: kernel copies will tell
		}
		for first < len(spans) {
			span := spans[first]
			end := uint64(span.Addr) + span.Bytes
			at := max(reached, uint64(span.Addr))
			if at >= end {
				first++
				continue
			}
			if at < area.start {
				return BackingNone, unusable(at, span, "is not mapped")
			}
			if at >= area.end {
				break
			}
			if !area.writable {
				return BackingNone, unusable(at, span, "is not writable")
			}
			if area.file {
				backing = BackingFile
			}
			reached = min(end, area.end)
			if reached < end {
				break
			}
		}
	}
	for ; first < len(spans); first++ {
		span := spans[first]
		if at := max(reached, uint64(span.Addr)); at < uint64(span.Addr)+span.Bytes {
			return BackingNone, unusable(at, span, "is not mapped")
		}
	}
	return backing, nil
}

func unusable(at uint64, span Span, what string) error {
	return status.Newf(status.ParamInvalid, status.StageCheck, "address %#x of the memory at %#x (%d bytes) %s", at, span.Addr, span.Bytes, what).
		Hinting("registered memory has to stay mapped and writable until it is unregistered")
}

// area is one line of the memory map.
type area struct {
	start, end     uint64
	writable, file bool
}

// parseArea reads "start-end perms offset major:minor inode [path]".
func parseArea(line []byte) (area, bool) {
	var fields [5][]byte
	for i := range fields {
		line = bytes.TrimLeft(line, " ")
		length := bytes.IndexAny(line, " \n")
		if length <= 0 {
			return area{}, false
		}
		fields[i], line = line[:length], line[length:]
	}
	low, high, ok := bytes.Cut(fields[0], []byte("-"))
	start, errStart := strconv.ParseUint(string(low), 16, 64)
	end, errEnd := strconv.ParseUint(string(high), 16, 64)
	if !ok || errStart != nil || errEnd != nil || len(fields[1]) < 4 {
		return area{}, false
	}
	// Names in brackets ([heap], [stack], [anon:...]) are the kernel's, for memory that no file backs.
	name := bytes.TrimSpace(line)
	named := len(name) > 0 && name[0] != '['
	return area{start: start, end: end, writable: fields[1][1] == 'w', file: named || string(fields[4]) != "0"}, true
}
