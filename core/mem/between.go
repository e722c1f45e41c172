// SPDX-License-Identifier: Apache-2.0

package mem

// betweenBytes is the scratch of [CopyBetween]: large enough to hide what a device's copy costs to start, small enough to stay in a
// cache between the two copies.
const betweenBytes = 1 << 20

// CopyBetween copies moves by device, under the rules of [Device].Copy, between memory of any backings. What may vanish is never given to
// a device's runtime, which can't answer for it: it goes by kernel copies to and from scratch.
func CopyBetween(device Device, moves []Move, to, from Backing, threads int) error {
	if (to == BackingDevice) == (from == BackingDevice) || to == BackingAnonymous || from == BackingAnonymous {
		return device.Copy(moves, to, from, threads)
	}
	scratch, err := NewBuffer(betweenBytes)
	if err != nil {
		return err
	}
	defer func() { _ = scratch.Free() }() // an munmap of our own mapping fails only for a wrong address
	left := wholeOf(moves)
	for piece, ok := left.next(betweenBytes); ok; piece, ok = left.next(betweenBytes) {
		in := []Move{{Dst: scratch.Addr(), Src: piece.Src, Bytes: piece.Bytes}}
		out := []Move{{Dst: piece.Dst, Src: scratch.Addr(), Bytes: piece.Bytes}}
		if to == BackingDevice {
			if err = CopyKernel(in); err == nil {
				err = device.Copy(out, to, BackingAnonymous, 1)
			}
		} else if err = device.Copy(in, BackingAnonymous, from, 1); err == nil {
			err = CopyKernel(out)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
