/* A wide-area network in one process: an Ethernet switch between TAP devices with a rate for each
 * port (up and down apart), one one-way delay, random loss, and a bounded queue before each wire.
 *
 * switch PREFIX DELAY_MS LOSS_PERCENT QUEUE_MS UP_MBIT:DOWN_MBIT...     one port for each pair of rates
 *
 * Devices are PREFIX0, PREFIX1, ...; the last byte of a destination's MAC is its port, so nothing is
 * learnt. Frames wait for the sender's wire, travel, then wait for the receiver's wire; a frame that
 * would wait longer than QUEUE_MS is dropped (tail drop). Without loss the devices take segmentation
 * offload, so that one read carries up to 64 KiB; with loss every packet is a frame of its own and is
 * lost by itself. Prints "ready" once the devices exist, and counts to standard error at the end.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define MAX_PORTS 64
#define WIRE_OVERHEAD_BYTES 24 /* preamble, checksum and gap of an Ethernet frame */
#define BATCH 256

typedef struct frame {
  struct frame *next;
  double deliver_seconds;
  int num_bytes; /* with the virtio header */
  unsigned char bytes[];
} frame;

typedef struct {
  int fd;
  double up_bytes_per_second, down_bytes_per_second, up_free_seconds, down_free_seconds;
  frame *first, *last; /* on their way to this port, in order of delivery */
} port;

static port ports[MAX_PORTS];
static int num_ports;
static double delay_seconds, loss_ratio, queue_seconds;
static long num_forwarded, num_lost, num_dropped;
static volatile sig_atomic_t is_stopped;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static double next_random(void) {
  static uint64_t x = 88172645463325252ull;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return (x >> 11) * (1.0 / 9007199254740992.0);
}

static void stop(int signal_number) { (void)signal_number, is_stopped = 1; }

static void open_port(int index, const char *prefix, const char *rates) {
  struct ifreq request;
  memset(&request, 0, sizeof request);
  request.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
  snprintf(request.ifr_name, IFNAMSIZ, "%s%d", prefix, index);
  int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
  if (fd < 0 || ioctl(fd, TUNSETIFF, &request) < 0) {
    perror("TAP device");
    exit(1);
  }
  int header_bytes = sizeof(struct virtio_net_hdr);
  ioctl(fd, TUNSETVNETHDRSZ, &header_bytes);
  if (loss_ratio == 0 && ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | 0x20 | 0x40) < 0)
    ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4); /* 0x20, 0x40: UDP, on newer kernels */
  double up_mbit, down_mbit;
  if (sscanf(rates, "%lf:%lf", &up_mbit, &down_mbit) != 2) {
    fprintf(stderr, "rates %s; wanted are UP_MBIT:DOWN_MBIT\n", rates);
    exit(2);
  }
  ports[index].fd = fd;
  ports[index].up_bytes_per_second = up_mbit * 1e6 / 8;
  ports[index].down_bytes_per_second = down_mbit * 1e6 / 8;
}

/* Bytes on the wire: every segment of a large frame has its own headers. */
static double wire_bytes(const unsigned char *bytes, int num_bytes) {
  const struct virtio_net_hdr *header = (const void *)bytes;
  int payload = num_bytes - (int)sizeof *header, segments = 1;
  if (header->gso_type != VIRTIO_NET_HDR_GSO_NONE && header->gso_size > 0)
    segments = (payload - header->hdr_len + header->gso_size - 1) / header->gso_size;
  return payload + (segments - 1) * (double)header->hdr_len + segments * WIRE_OVERHEAD_BYTES;
}

static void send_to(port *to, double at_seconds, double size, const unsigned char *bytes, int n) {
  double begin = to->down_free_seconds > at_seconds ? to->down_free_seconds : at_seconds;
  if (begin - at_seconds > queue_seconds) {
    num_dropped++;
    return;
  }
  frame *f = malloc(sizeof *f + n);
  if (f == NULL) {
    num_dropped++;
    return;
  }
  to->down_free_seconds = begin + size / to->down_bytes_per_second;
  f->next = NULL, f->deliver_seconds = to->down_free_seconds, f->num_bytes = n;
  memcpy(f->bytes, bytes, n);
  if (to->last) to->last->next = f; else to->first = f;
  to->last = f;
}

static void take(int from, const unsigned char *bytes, int num_bytes) {
  const unsigned char *ethernet = bytes + sizeof(struct virtio_net_hdr);
  double t = now(), size = wire_bytes(bytes, num_bytes);
  port *sender = &ports[from];
  if (loss_ratio > 0 && next_random() < loss_ratio) {
    num_lost++;
    return;
  }
  double begin = sender->up_free_seconds > t ? sender->up_free_seconds : t;
  if (begin - t > queue_seconds) {
    num_dropped++;
    return;
  }
  sender->up_free_seconds = begin + size / sender->up_bytes_per_second;
  double at = sender->up_free_seconds + delay_seconds;
  if (ethernet[0] & 1) { /* multicast: to everybody else */
    for (int i = 0; i < num_ports; i++)
      if (i != from) send_to(&ports[i], at, size, bytes, num_bytes);
  } else if (ethernet[5] < num_ports && ethernet[5] != from) {
    send_to(&ports[ethernet[5]], at, size, bytes, num_bytes);
  }
}

/* Deliver what is due; returns when the next frame is. */
static double deliver(void) {
  double t = now(), next = t + 1;
  for (int i = 0; i < num_ports; i++) {
    port *p = &ports[i];
    while (p->first && p->first->deliver_seconds <= t) {
      frame *f = p->first;
      if (write(p->fd, f->bytes, f->num_bytes) < 0) num_dropped++; else num_forwarded++;
      p->first = f->next;
      if (p->first == NULL) p->last = NULL;
      free(f);
    }
    if (p->first && p->first->deliver_seconds < next) next = p->first->deliver_seconds;
  }
  return next;
}

int main(int argc, char **argv) {
  static unsigned char bytes[sizeof(struct virtio_net_hdr) + 65536 + 64];
  struct pollfd polled[MAX_PORTS];
  if (argc < 6 || argc - 5 > MAX_PORTS) {
    fprintf(stderr, "usage: switch PREFIX DELAY_MS LOSS_PERCENT QUEUE_MS UP_MBIT:DOWN_MBIT...\n");
    return 2;
  }
  delay_seconds = atof(argv[2]) / 1e3, loss_ratio = atof(argv[3]) / 100;
  queue_seconds = atof(argv[4]) / 1e3, num_ports = argc - 5;
  for (int i = 0; i < num_ports; i++) {
    open_port(i, argv[1], argv[5 + i]);
    polled[i] = (struct pollfd){.fd = ports[i].fd, .events = POLLIN};
  }
  signal(SIGTERM, stop), signal(SIGINT, stop);
  puts("ready"), fflush(stdout);
  while (!is_stopped) {
    double wait = deliver() - now();
    if (wait < 0) wait = 0;
    struct timespec timeout = {(time_t)wait, (long)((wait - (time_t)wait) * 1e9)};
    ppoll(polled, num_ports, &timeout, NULL);
    for (int i = 0; i < num_ports; i++) {
      if (!(polled[i].revents & POLLIN)) continue;
      for (int k = 0; k < BATCH; k++) {
        int n = read(ports[i].fd, bytes, sizeof bytes);
        if (n < (int)sizeof(struct virtio_net_hdr) + 14) break;
        take(i, bytes, n);
      }
    }
  }
  fprintf(stderr, "forwarded %ld, lost %ld, dropped from queues %ld\n", num_forwarded, num_lost,
          num_dropped);
  return 0;
}
