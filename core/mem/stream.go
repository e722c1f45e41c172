// SPDX-License-Identifier: Apache-2.0

package mem

// Streaming stores go past the caches: the destination's old content isn't fetched only to be overwritten, which is a third of a
// large copy's traffic.

const (
	// streamAlign is the size of a cache line: streaming stores are only fast where they fill whole lines.
	streamAlign = 64
	// streamLeast is the shortest run that is streamed. Below it the lines that are cut at both ends, and starting anew, cost more
	// than is saved.
	streamLeast = 2 << 10
)

// stream copies a run of at most copyChunk bytes, of any length and alignment, with streaming stores where they pay off; streamFence
// has to follow before anybody is told of the bytes. next is where the run that comes after it begins, or 0: it is fetched ahead, so
// that short runs in a row are as fast as a long one.
func stream(m Move, next uintptr) {
	if m.Bytes < streamLeast {
		copy(View(m.Dst, m.Bytes), View(m.Src, m.Bytes))
		return
	}
	if next == 0 {
		next = m.Src // is in the cache, so that nothing is fetched
	}
	head := uint64(-m.Dst) % streamAlign
	body := (m.Bytes - head) &^ (streamStep - 1)
	tail := m.Bytes - head - body
	copy(View(m.Dst, head), View(m.Src, head))
	streamLines(m.Dst+uintptr(head), m.Src+uintptr(head), next, body)
	copy(View(m.Dst+uintptr(head+body), tail), View(m.Src+uintptr(head+body), tail))
}
