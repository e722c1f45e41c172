// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

func TestProbeWritable(t *testing.T) {
	whole := pages(t, 3)
	split := pages(t, 3) // three areas of one kind
	require.NoError(t, unix.Madvise(split.Bytes()[page:2*page], unix.MADV_DONTFORK))
	readOnly := pages(t, 3)
	require.NoError(t, unix.Mprotect(readOnly.Bytes()[page:2*page], unix.PROT_READ))
	memfd := fileMapping(t, 2*page, 2*page)
	path := filepath.Join(t.TempDir(), "a file")
	require.NoError(t, os.WriteFile(path, make([]byte, page), 0o600))
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	private, err := mapPages(int(file.Fd()), page, unix.MAP_PRIVATE)
	require.NoError(t, err)
	require.NoError(t, file.Close())
	t.Cleanup(func() { require.NoError(t, unmapPages(private)) })
	heap := make([]byte, 100)
	// Last of all, lest another mapping fills the hole.
	gap, err := NewBuffer(int(3 * page))
	require.NoError(t, err)
	gapAt := gap.Addr()
	require.NoError(t, unix.MunmapPtr(pointer(gapAt+uintptr(page)), uintptr(page)))
	t.Cleanup(func() {
		for _, i := range []uintptr{0, 2} {
			require.NoError(t, unix.MunmapPtr(pointer(gapAt+i*uintptr(page)), uintptr(page)))
		}
	})

	cases := []struct {
		name  string
		spans []Span
		want  Backing
		at    uintptr // expected in the error; 0: none
		what  string
	}{
		{"nothing", nil, BackingNone, 0, ""},
		{"no bytes anywhere", []Span{{1, 0}}, BackingNone, 0, ""},
		{"anonymous", []Span{{whole.Addr() + 1, 3*page - 1}}, BackingAnonymous, 0, ""},
		{"Go heap", []Span{{uintptr(unsafe.Pointer(&heap[0])), 100}}, BackingAnonymous, 0, ""},
		{"adjacent areas", []Span{{split.Addr(), 3 * page}}, BackingAnonymous, 0, ""},
		{"overlapping, unsorted", []Span{{whole.Addr() + 100, 10}, {whole.Addr(), 3 * page}, {whole.Addr() + 50, 100}}, BackingAnonymous, 0, ""},
		{"memfd", []Span{{addressOf(memfd), 2 * page}}, BackingFile, 0, ""},
		{"private mapping of a file", []Span{{addressOf(private), page}}, BackingFile, 0, ""},
		{"one part of a file", []Span{{addressOf(memfd) + 5, 1}, {whole.Addr(), 1}}, BackingFile, 0, ""},
		{"beside the read-only page", []Span{{readOnly.Addr(), page}, {readOnly.Addr() + uintptr(2*page), page}}, BackingAnonymous, 0, ""},
		{"read-only page", []Span{{readOnly.Addr() + 8, 2 * page}}, 0, readOnly.Addr() + uintptr(page), "is not writable"},
		{"beside the hole", []Span{{gapAt, page}, {gapAt + uintptr(2*page), page}}, BackingAnonymous, 0, ""},
		{"unmapped hole", []Span{{gapAt, 3 * page}}, 0, gapAt + uintptr(page), "is not mapped"},
		{"last byte in the hole", []Span{{gapAt, page + 1}}, 0, gapAt + uintptr(page), "is not mapped"},
		{"in the hole", []Span{{gapAt + uintptr(page) + 9, 1}}, 0, gapAt + uintptr(page) + 9, "is not mapped"},
		{"address 1", []Span{{whole.Addr(), 1}, {1, 8}}, 0, 1, "is not mapped"},
		{"end of the address space", []Span{{math.MaxUint64 - 7, 7}}, 0, math.MaxUint64 - 7, "is not mapped"},
		{"beyond the address space", []Span{{math.MaxUint64 - 7, 9}}, 0, math.MaxUint64 - 7, "runs beyond"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			got, err := ProbeWritable(c.spans)
			if c.at == 0 {
				require.NoError(t, err)
				require.Equal(t, c.want, got)
				return
			}
			require.ErrorIs(t, err, status.ParamInvalid)
			require.Equal(t, status.StageCheck, status.From(err, "").Stage)
			require.ErrorContains(t, err, fmt.Sprintf("address %#x of", c.at))
			require.ErrorContains(t, err, c.what)
			require.Equal(t, BackingNone, got)
		})
	}
}

func TestProbeLeavesWhatItCannotReadToTheKernel(t *testing.T) {
	for name, maps := range map[string]string{
		"no map":          "this is no memory map\n",
		"fields missing":  "1000-2000 rw-p\n",
		"bad numbers":     "x-y rw-p 0 00:00 0\n",
		"endless line":    "1000-2000 rw-p 0 00:00 0 " + strings.Repeat("x", mapsBuffer+1) + "\n",
		"line of a tease": "1000-2000 r\n",
	} {
		t.Run(name, func(t *testing.T) {
			backing, err := coverWritable(strings.NewReader(maps), []Span{{0x1000, 16}})
			require.NoError(t, err)
			require.Equal(t, BackingFile, backing)
		})
	}
}

func TestProbeKnowsTheKernelsOwnNames(t *testing.T) {
	for name, c := range map[string]struct {
		line string
		want Backing
	}{
		"heap":            {"1000-2000 rw-p 00000000 00:00 0                          [heap]\n", BackingAnonymous},
		"stack":           {"1000-2000 rw-p 00000000 00:00 0                          [stack]\n", BackingAnonymous},
		"named anonymous": {"1000-2000 rw-p 00000000 00:00 0                          [anon: Go: heap]\n", BackingAnonymous},
		"no name":         {"1000-2000 rw-p 00000000 00:00 0 \n", BackingAnonymous},
		"shared memory":   {"1000-2000 rw-s 00000000 00:01 77                         /dev/shm/x y\n", BackingFile},
		"deleted":         {"1000-2000 rw-s 00000000 00:01 77                         /memfd:q (deleted)\n", BackingFile},
		"shown to change": {"0800-1800 rw-p 00000000 00:00 0 \n1000-2000 rw-p 00000000 00:00 0 \n", BackingAnonymous},
	} {
		t.Run(name, func(t *testing.T) {
			backing, err := coverWritable(strings.NewReader(c.line), []Span{{0x1000, 0x1000}})
			require.NoError(t, err)
			require.Equal(t, c.want, backing)
		})
	}
}
