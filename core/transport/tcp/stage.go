// SPDX-License-Identifier: Apache-2.0

package tcp

import "github.com/llm-datadist-open/llm-datadist/core/mem"

// No socket reaches a device's memory. What is sent from there is copied, a chunk at a time, into a host buffer of the lane and goes out
// from that; what is received for it lands in such a buffer, and each system call's bytes are copied to their place before the operation
// is left. So all that is promised of memory in place holds for a device's too: whoever ends an operation waits for one copy, not for a peer.

// staged returns where a side of a lane stages what is to go to or comes from a device: the address of farFrame bytes.
func (a *active) staged() (uintptr, error) {
	if a.stage == nil {
		b, err := newBuffer(farFrame)
		if err != nil {
			return 0, err
		}
		a.stage = b
	}
	return a.stage.Addr(), nil
}

// carry copies bytes of a stream, from offset on, between their place and an address of ours: from there where the stream is the
// source's, else to there. The caller has seen to it that the memory stays.
func (a *active) carry(s *stream, at uintptr, offset, bytes uint64) error {
	space := a.workspace()
	for bytes > 0 {
		places, covered := s.spans(space.spans[:0], mem.MaxSpans, offset, bytes)
		moves := space.moves[:0]
		for _, place := range places {
			move := mem.Move{Dst: place.Addr, Src: at, Bytes: place.Bytes}
			if s.source {
				move.Dst, move.Src = move.Src, move.Dst
			}
			moves = append(moves, move)
			at += uintptr(place.Bytes)
		}
		if err := s.copy(moves); err != nil {
			return err
		}
		offset, bytes = offset+covered, bytes-covered
	}
	return nil
}

// copy copies between the stream's memory and ours.
func (s *stream) copy(moves []mem.Move) error {
	switch {
	case s.device == nil:
		return mem.CopyKernel(moves)
	case s.source:
		return s.device.Copy(moves, mem.BackingAnonymous, mem.BackingDevice, 1)
	}
	return s.device.Copy(moves, mem.BackingDevice, mem.BackingAnonymous, 1)
}
