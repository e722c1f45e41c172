// SPDX-License-Identifier: Apache-2.0

package backend

import (
	"context"
	"testing"
	"time"
)

// soon is longer than anything here takes on any machine.
const soon = time.Minute

func TestCancelReturnsZeroOnlyWhenTheOperationHasLetGo(t *testing.T) {
	const number = 7
	cancelled, letGo := make(chan struct{}), make(chan struct{})
	got := Start(number, 0, 0, func(ctx context.Context) (string, error) {
		<-ctx.Done()
		close(cancelled)
		<-letGo
		return "text", nil
	})
	if got != 1 {
		t.Fatalf("Start returned %d for an operation that is running", got)
	}
	if got := Cancel(number, time.Millisecond); got != 1 {
		t.Fatalf("Cancel returned %d while the operation was not through", got)
	}
	<-cancelled
	close(letGo)
	if got := Cancel(number, soon); got != 0 {
		t.Fatalf("Cancel returned %d for an operation that has ended", got)
	}
	if held := Held(); held != 0 {
		t.Fatalf("%d things are kept of a cancelled operation", held)
	}
}

func TestCancelledOperationIsForgottenWithoutAnotherCall(t *testing.T) {
	const number = 8
	letGo := make(chan struct{})
	Start(number, 0, 0, func(context.Context) (string, error) { <-letGo; return "text", nil })
	state.mu.Lock()
	op := state.operations[number]
	state.mu.Unlock()
	if got := Cancel(number, 0); got != 1 {
		t.Fatalf("Cancel returned %d for an operation that is running", got)
	}
	close(letGo)
	<-op.done
	if held := Held(); held != 0 {
		t.Fatalf("%d things are kept of a cancelled operation", held)
	}
}

func TestEndIsSeenHoweverShortTheWait(t *testing.T) {
	done := make(chan struct{})
	close(done)
	for range 1000 {
		if !closed(done, 0) {
			t.Fatal("an operation that has ended was taken for one that is running")
		}
	}
}
