//go:build linux

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"runtime"
	"sync"
	"time"

	"golang.org/x/crypto/chacha20poly1305"
	"golang.org/x/sys/unix"

	"perimeterd/internal/lab"
)

// span is how long each is measured once.
const span = 500 * time.Millisecond

// rate runs work on one core for a span, and says how often a second of that core's time.
func rate(work func() error) (float64, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cpu := func() (time.Duration, error) {
		var u unix.Rusage
		err := unix.Getrusage(unix.RUSAGE_THREAD, &u)
		return time.Duration(u.Utime.Nano() + u.Stime.Nano()), err
	}
	before, err := cpu()
	if err != nil {
		return 0, err
	}
	n := 0
	for end := time.Now().Add(span); time.Now().Before(end); n++ {
		if err := work(); err != nil {
			return 0, err
		}
	}
	after, err := cpu()
	return float64(n) / (after - before).Seconds(), err
}

// A full packet of the tunnel, and how many of them are sealed between two looks at the clock.
const packet, burst = 1420, 64

func seal() (float64, error) {
	aead, nonce, err := box()
	if err != nil {
		return 0, err
	}
	buf := make([]byte, packet, packet+aead.Overhead())
	r, err := rate(func() error {
		for range burst {
			aead.Seal(buf[:0], nonce, buf[:packet], nil)
		}
		return nil
	})
	return r * burst * packet, err
}

func unseal() (float64, error) {
	aead, nonce, err := box()
	if err != nil {
		return 0, err
	}
	sealed, out := aead.Seal(nil, nonce, make([]byte, packet), nil), make([]byte, packet)
	r, err := rate(func() error {
		for range burst {
			if _, err := aead.Open(out[:0], nonce, sealed, nil); err != nil {
				return err
			}
		}
		return nil
	})
	return r * burst * packet, err
}

func box() (interface {
	Overhead() int
	Seal(dst, nonce, plaintext, additionalData []byte) []byte
	Open(dst, nonce, ciphertext, additionalData []byte) ([]byte, error)
}, []byte, error) {
	key := make([]byte, chacha20poly1305.KeySize)
	if _, err := rand.Read(key); err != nil {
		return nil, nil, err
	}
	aead, err := chacha20poly1305.New(key)
	return aead, make([]byte, chacha20poly1305.NonceSize), err
}

// handshake is the CPU time of both ends of the gate's handshake.
func handshake() (float64, error) {
	cert, pool, err := certificate()
	if err != nil {
		return 0, err
	}
	server := &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
		MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true}
	client := &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: pool, ServerName: "gate.test", MinVersion: tls.VersionTLS13}
	before, err := process()
	if err != nil {
		return 0, err
	}
	n := 0
	for end := time.Now().Add(span); time.Now().Before(end); n++ {
		a, b := net.Pipe()
		there := make(chan error, 1)
		go func() { there <- tls.Server(b, server).Handshake() }()
		if err := errors.Join(tls.Client(a, client).Handshake(), <-there); err != nil {
			return 0, err
		}
		a.Close()
		b.Close()
	}
	after, err := process()
	return (after - before).Seconds() / float64(n), err
}

// process is the CPU time of all threads so far.
func process() (time.Duration, error) {
	var u unix.Rusage
	err := unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), err
}

func certificate() (c tls.Certificate, pool *x509.CertPool, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return c, nil, err
	}
	t := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "gate.test"}, DNSNames: []string{"gate.test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return c, nil, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return c, nil, err
	}
	pool = x509.NewCertPool()
	pool.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, pool, nil
}

func pipe() (float64, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return 0, err
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	b := make([]byte, 1)
	r, err := rate(func() error {
		for range burst {
			if _, err := unix.Write(p[1], b); err != nil {
				return err
			}
			if _, err := unix.Read(p[0], b); err != nil {
				return err
			}
		}
		return nil
	})
	return 1 / (r * burst), err
}

// cable sends from the bastion to the cloud's host, so over the egress link, and says what arrives.
func cable(ctx context.Context, flows int) (_ float64, err error) {
	l, err := lab.New(ctx, lab.Options{})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	var listener net.Listener
	if err := l.Cloud.Do(func() (err error) {
		listener, err = net.Listen("tcp4", net.JoinHostPort(l.Cloud.Addr.String(), "9"))
		return err
	}); err != nil {
		return 0, err
	}
	defer listener.Close()
	var all sync.WaitGroup
	errs, counts := make([]error, flows), make([]int64, flows)
	end := time.Now().Add(2 * span)
	for i := range flows {
		var out net.Conn
		if err := l.Bastion.Do(func() (err error) {
			out, err = net.DialTimeout("tcp4", listener.Addr().String(), 5*time.Second)
			return err
		}); err != nil {
			return 0, err
		}
		in, err := listener.Accept()
		if err != nil {
			return 0, errors.Join(err, out.Close())
		}
		all.Go(func() {
			defer out.Close()
			buf := make([]byte, 256<<10)
			for time.Now().Before(end) {
				if _, err := out.Write(buf); err != nil {
					errs[i] = err
					return
				}
			}
		})
		all.Go(func() {
			defer in.Close()
			counts[i], _ = io.Copy(struct{ io.Writer }{io.Discard}, in) // by 32 KiB
		})
	}
	start := time.Now()
	all.Wait()
	took, sum := time.Since(start), int64(0)
	for _, n := range counts {
		sum += n
	}
	return float64(sum) / took.Seconds(), errors.Join(errs...)
}
